"""Environment variables that DeepSpeed, transformers and vLLM read on import, and malloc settings.

Import this module before those libraries.
"""

import ctypes
import os
import warnings

# Keep the libraries' own logging out of a job's log. Variables that are already set stay.
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
# Addressed to the libraries' developers.
warnings.simplefilter("ignore", FutureWarning)

import torch  # noqa: E402

# DeepSpeed selects its device on import, and transformers imports DeepSpeed.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# glibc's mallopt parameters, in bytes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MALLOC_THRESHOLD = 2**30


def keep_freed_memory() -> None:
    """Let malloc reuse freed memory on CPUs instead of returning it to the system.

    With glibc's defaults a vLLM engine maps each step's tensors anew, at 20 % of its speed.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, MALLOC_THRESHOLD)
        libc.mallopt(M_MMAP_THRESHOLD, MALLOC_THRESHOLD)
