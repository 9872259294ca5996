"""DeepSpeed, transformers and vLLM, behind the few verbs that the rest of the package needs."""

import ctypes
import os
import warnings

# They speak of themselves at length; what a reader of a job's log wants is ours. Read when they
# are imported; a variable that is set already stays.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
for name, value in QUIET.items():
    os.environ.setdefault(name, value)
# Meant for those who write these libraries.
warnings.simplefilter("ignore", FutureWarning)

import torch  # noqa: E402

# DeepSpeed picks its device when it is imported, and transformers imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# glibc's mallopt: when to give memory back, and from what size on to map it afresh, in bytes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST = 2**30


def keep_freed_memory() -> None:
    """On CPUs: use the memory of one step's tensors again in the next. By default glibc hands it
    back and takes it anew, page by page, which costs a vLLM engine a fifth of its speed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, MOST)
        libc.mallopt(M_MMAP_THRESHOLD, MOST)
