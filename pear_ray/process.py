"""Settings of a process: its log lines, variables that libraries read on import, and malloc."""

from __future__ import annotations

import ctypes
import logging
import os
import warnings
from functools import cache
from typing import Any, Literal

from pythonjsonlogger.json import JsonFormatter

JSON_FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s %(run)s %(stage)s %(step)s"

# Keep the libraries' own logging out of a job's log. Variables that are already set stay.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

# glibc's mallopt parameters, in bytes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MALLOC_THRESHOLD = 2**30


# Run and stage of this process, for its log records.
LOG_CONTEXT: dict[str, str | None] = {"run": None, "stage": None}


def add_context(record: logging.LogRecord) -> bool:
    """Add run, stage and step (`extra={"step": step}`) to a log record."""
    record.__dict__ |= LOG_CONTEXT | {"step": getattr(record, "step", None)}
    return True


def configure_logging(form: Literal["text", "json"], text_format: str = "%(message)s", **options: Any) -> None:
    """Send this process's log lines to stderr, in the form of `tracking.logs`: text for people (`options` go to
    logging.Formatter), or JSON objects with run, stage and step for log collectors."""
    handler = logging.StreamHandler()
    handler.addFilter(add_context)
    handler.setFormatter(JsonFormatter(JSON_FIELDS) if form == "json" else logging.Formatter(text_format, **options))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


@cache
def quiet_libraries() -> None:
    """Set what torch, transformers and vLLM read on import; call it before."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Addressed to the libraries' developers.
    warnings.simplefilter("ignore", FutureWarning)


@cache
def prepare_libraries() -> None:
    """Set what these libraries and DeepSpeed read on import; call it before. Takes torch's two seconds."""
    quiet_libraries()
    import torch

    # DeepSpeed selects its device on import, and transformers imports DeepSpeed.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def keep_freed_memory() -> None:
    """Let malloc reuse freed memory on CPUs instead of returning it to the system: with glibc's defaults a vLLM engine
    maps each step's tensors anew, at 20 % of its speed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, MALLOC_THRESHOLD)
        libc.mallopt(M_MMAP_THRESHOLD, MALLOC_THRESHOLD)
