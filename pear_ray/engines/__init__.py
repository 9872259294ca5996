"""DeepSpeed, transformers and vLLM, behind the few verbs that the rest of the package needs."""

import os

import torch

# DeepSpeed picks its device when it is imported, and transformers imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
