"""DeepSpeed, transformers and vLLM, behind the few verbs that the rest of the package needs."""

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
