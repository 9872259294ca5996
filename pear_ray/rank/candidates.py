"""Who is ranked, and what evaluations say of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pear_ray.config import Job, is_after_rl, read_job, start_of
from pear_ray.errors import ConfigError
from pear_ray.metrics import read_metrics
from pear_ray.statistics import mean_pass_at_k, overtraining

# What must be alike for counts of right answers to be compared.
SAMPLER = ("samples_per_problem", "temperature", "max_new_tokens")


@dataclass(frozen=True)
class Candidate:
    """A model that RL could start from.

    `num_correct` int64 [problems], in the order of `Field.problem_ids`; `card` is its part of the
    scorecard; `trained_on` names data and loss of its SFT, where known: held-out losses say
    something within one such name; `regime` is that of its held-out loss; `after_rl` is pass@1
    after RL, where known.
    """

    label: str
    card: dict[str, Any]
    num_correct: np.ndarray
    trained_on: str | None
    regime: str | None
    after_rl: float | None


@dataclass(frozen=True)
class CandidateSet:
    """All candidates, evaluated on the same problems in the same way."""

    problem_ids: tuple[str, ...]
    sampler: dict[str, Any]
    candidates: tuple[Candidate, ...]

    @property
    def num_samples(self) -> int:
        """Answers to each problem."""
        return int(self.sampler["samples_per_problem"])

    def pass_at_k(self, candidate: Candidate, k: int) -> np.ndarray:
        """pass@k of each problem, float64 [problems]."""
        return mean_pass_at_k(self.num_samples, candidate.num_correct, k)


def read(job: Job) -> CandidateSet:
    """The candidates of the job's own run and of those in `rank.runs`.

    Raises:
        ConfigError: nothing was evaluated, attempts are missing, or evaluations cannot be compared.
    """
    folders = {"": job.folder} | {f"{folder}:": Path(folder) for folder in job.rank.runs}
    cards = {folder: scorecard(folder) for folder in folders.values()}
    refuse_other_samplers(cards)
    candidates: list[Candidate] = []
    problem_ids: tuple[str, ...] = ()
    for prefix, folder in folders.items():
        counts, theirs = attempts(folder, cards[folder])
        if problem_ids and theirs != problem_ids:
            raise ConfigError(
                f"{folder}/evaluate/attempts.parquet: {len(set(theirs) & set(problem_ids))} of"
                f" {len(theirs)} problems are those of {job.folder}; expected the same problems"
                " (tasks, evaluation.num_problems, run.seed)"
            )
        problem_ids = theirs
        candidates += of_run(job, prefix, folder, cards[folder], counts)
    named = {candidate.label for candidate in candidates}
    for field in ("after_rl", "trained_on"):
        if unknown := sorted(getattr(job.rank, field).keys() - named):
            raise ConfigError(f"rank.{field}: read {unknown}; expected names among {sorted(named)}")
    if len(candidates) < 2:
        raise ConfigError(
            f"{job.folder}/evaluate/scorecard.json: read {len(candidates)} checkpoints that RL"
            f" could start from, {sorted(named)}; expected at least two (evaluation.checkpoints,"
            " rank.runs)"
        )
    sampler = {key: cards[job.folder].get(key) for key in SAMPLER}
    return CandidateSet(problem_ids, sampler, tuple(candidates))


def scorecard(folder: Path) -> dict[str, Any]:
    """What stage `evaluate` found in a run folder.

    Raises:
        ConfigError: it has not run there, or its file is torn.
    """
    path = folder / "evaluate" / "scorecard.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read; expected what stage `evaluate` writes"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


def refuse_other_samplers(cards: dict[Path, dict[str, Any]]) -> None:
    """Raises ConfigError where two evaluations did not sample alike."""
    (own, first), *others = cards.items()
    for folder, card in others:
        for key in SAMPLER:
            if card.get(key) != first.get(key):
                raise ConfigError(
                    f"{folder}/evaluate/scorecard.json: {key}: read {card.get(key)}; expected"
                    f" {first.get(key)}, as in {own}"
                )


def attempts(folder: Path, card: dict[str, Any]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Right answers by checkpoint, int64 [problems], and the problems, in order.

    Raises:
        ConfigError: an answer is missing, or one is there twice.
    """
    path = folder / "evaluate" / "attempts.parquet"
    if not path.exists():
        raise ConfigError(f"{path}: missing; expected what stage `evaluate` writes")
    table = pq.read_table(path, columns=["checkpoint", "problem_id", "correct"])
    grouped = table.group_by(["checkpoint", "problem_id"]).aggregate(
        [("correct", "sum"), ("correct", "count")]
    )
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for row in grouped.to_pylist():
        of_checkpoint = found.setdefault(row["checkpoint"], {})
        of_checkpoint[row["problem_id"]] = row["correct_sum"], row["correct_count"]
    num_samples = card["samples_per_problem"]
    problem_ids = tuple(sorted({name for counts in found.values() for name in counts}))
    for label in card["checkpoints"]:
        sampled = [found.get(label, {}).get(name, (0, 0))[1] for name in problem_ids]
        if not sampled or set(sampled) != {num_samples}:
            raise ConfigError(
                f"{path}: checkpoint {label!r}: read {sum(sampled)} answers; expected {num_samples}"
                f" to each of {len(problem_ids)} problems"
            )
    right = {
        label: np.array([found[label][name][0] for name in problem_ids], np.int64)
        for label in card["checkpoints"]
    }
    return right, problem_ids


def of_run(
    job: Job, prefix: str, folder: Path, card: dict[str, Any], counts: dict[str, np.ndarray]
) -> Iterator[Candidate]:
    """The candidates of one run: all evaluated checkpoints but those after RL, which tell what
    became of others."""
    num_samples, config = card["samples_per_problem"], folder / "config.json"
    own_job = job if folder == job.folder else read_job(config) if config.exists() else None
    homes = own_job.homes(folder) if own_job else {}
    after: dict[str | None, list[float]] = {}
    for label, right in counts.items():
        if is_after_rl(label):
            after.setdefault(start_of(label, counts), []).append(float(right.mean()) / num_samples)
    for label, own in card["checkpoints"].items():
        if is_after_rl(label):
            continue
        arm, _, stage = label.rpartition("/")
        home = homes.get(arm) if stage == "sft" else None
        name = prefix + label
        known = float(np.mean(after[label])) if label in after else None
        yield Candidate(
            label=name,
            card=own,
            num_correct=counts[label],
            trained_on=job.rank.trained_on.get(name) or (trained_on(home) if home else None),
            regime=regime(home) if home else None,
            after_rl=job.rank.after_rl.get(name, known),
        )


def trained_on(home: Path) -> str | None:
    """Data and loss of the SFT in a run folder. A weighted loss aims at something else than a plain
    one, so that held-out losses after the two are not compared either."""
    path = home / "config.json"
    if not path.exists():
        return None
    job = json.loads(path.read_text())
    sft, data = job["sft"], job["corpus"]["scored_path"] or str((home / "scored").absolute())
    authors = f" of {', '.join(sft['sources'])}" if sft.get("sources") else ""
    return f"{data}{authors}, {sft['objective']}, weights {sft['level']}, control {sft['control']}"


def regime(home: Path) -> str | None:
    """How far the SFT in a run folder went beyond its lowest held-out loss, if it measured one."""
    rows = [row for row in read_metrics(home, "sft") if "heldout_loss" in row]
    return overtraining(rows[-1]["heldout_loss"], rows[-1]["lowest_heldout_loss"]) if rows else None
