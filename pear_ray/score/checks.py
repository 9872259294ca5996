"""Checks that stop stage `score` before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from pear_ray.config import Job
from pear_ray.data.tokenizer import load_tokenizer, tokenizer_digests
from pear_ray.errors import ConfigError
from pear_ray.score.merge import ScoreStats


@dataclass(frozen=True)
class TrainerGap:
    """Trainer minus engine log-probs of one model's probe, nats per trainable token.

    `bias` is the mean, `spread` the standard deviation; the gaps are absolute.
    """

    rows: int
    tokens: int
    bias: float
    spread: float
    mean_gap: float
    max_gap: float


def check_same_tokenizer(job: Job) -> tuple[str, str]:
    """Return the digests of tokenizer and chat template.

    Raise ConfigError if a behavior policy has others: a PEAR ratio compares two probabilities of the SAME token.
    """
    ours = tokenizer_digests(load_tokenizer(job.model_path()))
    for source in job.behavior:
        field, path = f"behavior.{source}.path", job.model_path(source)
        theirs = tokenizer_digests(load_tokenizer(path, field))
        if theirs != ours:
            part = "vocabulary" if theirs[0] != ours[0] else "chat template"
            raise ConfigError(
                f"{field}: expected the {part} of {job.model_path()}, since PEAR divides two"
                f" probabilities of the same token, got another one in {path}"
            )
    return ours


def check_rejected(job: Job, path: str, num_rejected: int, num_rows: int, rejected: Iterator[dict[str, str]]) -> None:
    """Raise ConfigError, with the first reason, if too many rows are rejected."""
    limit = job.corpus.max_rejected_fraction
    if num_rejected > limit * num_rows:
        first = next(rejected)
        raise ConfigError(
            f"{path}: row {first['example_id']!r}: {first['reason']}\ncorpus.max_rejected_fraction: expected at most"
            f" {limit} of the rows rejected, got {num_rejected} of {num_rows}"
        )


def check_recorded_logprobs(job: Job, stats: ScoreStats) -> None:
    """Raise ConfigError if recorded log-probs are not those of the source's model."""
    limit = job.corpus.max_logprob_gap
    for source, numbers in stats.by_source().items():
        gap = numbers["recorded_gap_mean"]
        if gap is not None and not gap <= limit:
            raise ConfigError(
                f"{job.corpus.columns.behavior_logprobs}: expected log-probs of"
                f" {job.model_path(source)} for source {source!r} within"
                f" corpus.max_logprob_gap = {limit} nats per token, got a gap of {gap:.3g} (or set"
                ' corpus.recorded_logprobs = "ignore" to compute them)'
            )


def check_trainer_gaps(job: Job, gaps: Mapping[str, TrainerGap | None]) -> None:
    """Raise ConfigError if engine and trainer disagree: PEAR ratios would consist of that error."""
    limit = job.corpus.max_logprob_gap
    for source, gap in gaps.items():
        if gap is not None and not gap.mean_gap <= limit:
            raise ConfigError(
                f"behavior.{source}: expected engine and trainer log-probs of {job.model_path(source)} within"
                f" corpus.max_logprob_gap = {limit} nats per token, got a gap of {gap.mean_gap:.3g} on {gap.rows} rows"
            )


def compare_with_trainer(job: Job, folder: Path) -> dict[str, TrainerGap | None]:
    """Return the gaps between trainer and engine on the probe, by source."""
    settings = job.generator
    task = measure_trainer_gap.options(
        num_cpus=settings.num_cpus, num_gpus=-(-settings.num_gpus // 1), label_selector=job.placement.generators
    )
    tokens_per_pack, threads = job.learner.tokens_per_pack, settings.threads
    gaps = {
        source: task.remote(folder / "probe", job.model_path(source), job.model.dtype, tokens_per_pack, threads)
        for source in job.behavior
    }
    timeout = settings.timeout_seconds
    return {source: ray.get(gap, timeout=timeout) for source, gap in gaps.items()}


@ray.remote
def measure_trainer_gap(
    folder: Path, model: str, dtype: str, tokens_per_pack: int, num_threads: int
) -> TrainerGap | None:
    """Run the trainer's forward pass on the probe's rows of one model; None if it has none."""
    from pear_ray.train.model import trainer_logprobs

    table = pq.ParquetDataset(sorted(map(str, folder.glob("*.parquet")))).read()
    rows = table.filter(pc.equal(table.column("behavior_model"), model)).to_pylist()
    if not rows:
        return None
    ids = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    logprobs = trainer_logprobs(model, dtype, ids, tokens_per_pack, num_threads)
    differences = [
        (ours - np.asarray(row["behavior_logprobs"]))[row["trainable"] or ...]
        for ours, row in zip(logprobs, rows, strict=True)
    ]
    gaps = np.concatenate(differences).astype(np.float64)
    return TrainerGap(
        rows=len(rows),
        tokens=len(gaps),
        bias=float(gaps.mean()),
        spread=float(gaps.std()),
        mean_gap=float(np.abs(gaps).mean()),
        max_gap=float(np.abs(gaps).max()),
    )
