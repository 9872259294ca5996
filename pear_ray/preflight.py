"""Check a job's inputs before anything expensive starts."""

from __future__ import annotations

import os
from glob import glob
from pathlib import Path

from pear_ray.config import Job
from pear_ray.errors import ConfigError
from pear_ray.tasks import make_tasks


def check_inputs(job: Job, stage: str) -> None:
    """Refuse what can be seen to be missing without a cluster.

    Raises:
        ConfigError: a section or a corpus that is not there, a model folder that is not whole, or a
            task's option that its family does not know.
    """
    make_tasks(job.tasks)
    corpus = job.corpus
    nowhere = corpus.path is None and corpus.sample is None and corpus.scored_path is None
    if nowhere and stage in ("score", "pipeline", "study"):
        raise ConfigError(
            "corpus.path: missing; expected a Parquet or JSONL file or folder, or [corpus.sample]"
        )
    if corpus.sample is None and stage == "sample":
        raise ConfigError("corpus.sample: missing; expected how many examples to sample from whom")
    if job.cooperate is None and stage == "cooperate":
        raise ConfigError("cooperate: missing; expected a section [cooperate] with a method")
    # What lies elsewhere is looked for when it is read.
    is_here = corpus.path is not None and "://" not in corpus.path
    if is_here and not glob(os.path.expanduser(corpus.path or "")):
        raise ConfigError(
            f"corpus.path: read {corpus.path!r}; expected a file or folder that exists"
        )
    if job.rl.replay is not None and not Path(job.rl.replay).is_dir():
        raise ConfigError(
            f"rl.replay: read {job.rl.replay!r}; expected a folder that exists, RUN/rl/rollouts of"
            " a run with rl.record"
        )
    named = {"model.path": job.model.path}
    named |= {f"behavior.{source}.path": model.path for source, model in job.behavior.items()}
    named |= {f"evaluation.checkpoints.{n}": p for n, p in job.evaluation.checkpoints.items()}
    for field, path in named.items():
        if path is not None:
            check_model_folder(field, path)


def check_model_folder(field: str, path: str) -> None:
    """Refuse a folder without config or tokenizer. A name that is no path is left to the hub."""
    looks_like_hub_name = path.count("/") <= 1 and not path.startswith((".", "/", "~"))
    folder = Path(path)
    if not folder.exists():
        if looks_like_hub_name:
            return
        raise ConfigError(f"{field}: read {path!r}; expected a folder that exists, or a hub name")
    if not (folder / "config.json").exists():
        raise ConfigError(f"{field}: {path}/config.json is missing; expected a Hugging Face folder")
    if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(
            f"{field}: {path} holds no tokenizer; expected tokenizer.json and"
            " tokenizer_config.json beside config.json"
        )
