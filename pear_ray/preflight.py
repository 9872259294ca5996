"""Checks of a job's inputs that need no cluster, before anything expensive starts."""

from __future__ import annotations

import os
from glob import glob
from pathlib import Path

from pear_ray.config import Job
from pear_ray.errors import ConfigError, require
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
    fits = not is_local or glob(os.path.expanduser(corpus.path or ""))
    require(fits, "corpus.path", "a file or folder that exists", repr(corpus.path))
    replay = job.rl.replay
    expected = "RUN/rl/rollouts of a run with rl.record"
    require(replay is None or Path(replay).is_dir(), "rl.replay", expected, f"{replay!r}, which is no folder")
    models = {"model.path": job.model.path}
    models |= {f"behavior.{source}.path": model.path for source, model in job.behavior.items()}
    models |= {f"evaluation.checkpoints.{n}": p for n, p in job.evaluation.checkpoints.items()}
    for field, path in models.items():
        if path is not None:
            check_model_folder(field, path)


def check_model_folder(field: str, path: str) -> None:
    """Raise ConfigError if a folder has no config or tokenizer; leave hub names to the hub."""
    folder = Path(path)
    if not folder.exists():
        looks_like_hub_name = path.count("/") <= 1 and not path.startswith((".", "/", "~"))
        require(looks_like_hub_name, field, "a folder that exists or a hub name", repr(path))
        return
    has_config = (folder / "config.json").exists()
    require(has_config, field, "a Hugging Face folder", f"{path!r} without config.json")
    has_tokenizer = any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    expected = "tokenizer.json and tokenizer_config.json beside config.json"
    require(has_tokenizer, field, expected, f"{path!r} without a tokenizer")
