"""What stops the stage, with nothing written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pear_ray.config import Job
from pear_ray.data.tokenizer import load_tokenizer, tokenizer_digests
from pear_ray.errors import ConfigError
from pear_ray.score.merge import ScoreStats


def check_same_tokenizer(job: Job) -> tuple[str, str]:
    """The digests of vocabulary and chat template.

    Raises:
        ConfigError: a behavior policy has another than the student: a token ratio compares
            two probabilities of the SAME token.
    """
    ours = tokenizer_digests(load_tokenizer(job.model_path()))
    for source in job.behavior:
        theirs = tokenizer_digests(
            load_tokenizer(job.model_path(source), f"behavior.{source}.path")
        )
        if theirs != ours:
            what = "vocabulary" if theirs[0] != ours[0] else "chat template"
            raise ConfigError(
                f"behavior.{source}: {job.model_path(source)} has another {what} than"
                f" {job.model_path()}; expected the same, since PEAR divides the probabilities of"
                " one token, at one place of one text, under both models"
            )
    return ours


def refuse_too_many(
    job: Job, path: str, num_rejected: int, num_rows: int, rejected: Iterator[dict[str, Any]]
) -> None:
    """Stop, with nothing written, when more rows are unusable than the job allows."""
    allowed = job.corpus.max_rejected_fraction
    if num_rejected > allowed * num_rows:
        first = next(rejected)
        raise ConfigError(
            f"{path}: row {first['example_id']!r}: {first['reason']}\n"
            f"{num_rejected} of {num_rows} rows are unusable; expected at most a share of"
            f" corpus.max_rejected_fraction = {allowed}"
        )


def refuse_unconfirmed(job: Job, figures: ScoreStats) -> None:
    """Stop where the log-probs that a corpus brings are not those of the model that is said to
    have written it."""
    limit = job.corpus.max_logprob_gap
    for source, numbers in figures.by_source().items():
        gap = numbers["recorded_gap_mean"]
        if gap is not None and not gap <= limit:
            raise ConfigError(
                f"{job.corpus.columns.behavior_logprobs}: on a probe, those of source {source!r}"
                f" differ by {gap:.3g} nats per token from those of {job.model_path(source)};"
                f" expected at most corpus.max_logprob_gap = {limit} (or"
                ' corpus.recorded_logprobs = "ignore", to compute them anew)'
            )


def refuse_disagreement(job: Job, calibration: dict[str, Any]) -> None:
    """Stop where the engine and the trainer's forward pass do not say the same of a probe: the
    ratios would be made of that difference."""
    limit = job.corpus.max_logprob_gap
    for source, numbers in calibration.items():
        gap = numbers.get("mean_gap", 0.0)
        if not gap <= limit:
            raise ConfigError(
                f"behavior.{source}: {job.model_path(source)}: engine and trainer's forward pass"
                f" differ by {gap:.3g} nats per token on {numbers['rows']} rows; expected at most"
                f" corpus.max_logprob_gap = {limit}"
            )
