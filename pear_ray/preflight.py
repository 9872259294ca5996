"""Checks of a job's inputs that need no cluster, before anything expensive starts."""

from __future__ import annotations

import os
from glob import glob
from pathlib import Path

from pear_ray.config import Job
from pear_ray.errors import ConfigError
from pear_ray.tasks import make_tasks


def check_inputs(job: Job, stage: str) -> None:
    """Raise ConfigError if a section or corpus that the stage needs is missing, a model folder is incomplete, or a task
    has an unknown option."""
    make_tasks(job.tasks)
    corpus = job.corpus
    has_corpus = corpus.path or corpus.sample or corpus.scored_path
    if not has_corpus and stage in ("score", "pipeline", "study"):
        raise ConfigError("corpus.path: missing; expected a Parquet or JSONL file or folder, or [corpus.sample]")
    if corpus.sample is None and stage == "sample":
        raise ConfigError("corpus.sample: missing; expected num_examples of each source")
    if job.cooperate is None and stage == "cooperate":
        raise ConfigError("cooperate: missing; expected a section [cooperate] with a method")
    # Remote paths are checked when they are read.
    is_local = corpus.path is not None and "://" not in corpus.path
    if is_local and not glob(os.path.expanduser(corpus.path or "")):
        raise ConfigError(f"corpus.path: expected a file or folder that exists, got {corpus.path!r}")
    if job.rl.replay is not None and not Path(job.rl.replay).is_dir():
        raise ConfigError(
            f"rl.replay: expected RUN/rl/rollouts of a run with rl.record, got {job.rl.replay!r}, which is no folder"
        )
    models = {"model.path": job.model.path}
    models |= {f"behavior.{source}.path": model.path for source, model in job.behavior.items()}
    models |= {f"evaluation.checkpoints.{n}": p for n, p in job.evaluation.checkpoints.items()}
    for field, path in models.items():
        if path is not None:
            check_model_folder(field, path)


def check_model_folder(field: str, path: str) -> None:
    """Raise ConfigError if a folder has no config or tokenizer; leave hub names to the hub."""
    looks_like_hub_name = path.count("/") <= 1 and not path.startswith((".", "/", "~"))
    folder = Path(path)
    if not folder.exists():
        if looks_like_hub_name:
            return
        raise ConfigError(f"{field}: expected a folder that exists or a hub name, got {path!r}")
    if not (folder / "config.json").exists():
        raise ConfigError(f"{field}: expected a Hugging Face folder, got {path!r} without config.json")
    if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(
            f"{field}: expected tokenizer.json and tokenizer_config.json beside config.json, got"
            f" {path!r} without a tokenizer"
        )
