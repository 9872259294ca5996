"""The Ray cluster a stage runs on."""

from __future__ import annotations

import logging
import os

import ray

# Engines and libraries speak of themselves at length; what a reader of the job's log wants is ours.
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CONFIGURE_LOGGING": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}
HANDED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "HF_TOKEN", *QUIET)


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names or that runs on this machine; else start one here.

    Every process of the job gets the driver's word on how much libraries should say.
    """
    if ray.is_initialized():
        return
    variables = QUIET | {name: os.environ[name] for name in HANDED_ON if name in os.environ}
    ray.init(runtime_env={"env_vars": variables}, logging_level=logging.WARNING)
