"""The candidates that `rank` compares, read from evaluated runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.config import Job, is_after_rl, read_job, start_of
from pear_ray.errors import ConfigError, require
from pear_ray.metrics import read_metrics
from pear_ray.run import read_document
from pear_ray.statistics import overtraining, pass_at_k_by_problem

# Numbers of correct answers are comparable only if these are equal.
SAMPLER = ("samples_per_problem", "temperature", "max_new_tokens")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that RL could start from.

    `card` is its part of the scorecard; `num_correct` of `num_samples` answers, int64 [problems], in one order for all
    candidates. None if unknown: `trained_on`, data and loss of its SFT (held-out losses are comparable within one such
    name); `regime` of its held-out loss; `after_rl`, pass@1 after RL.

        Candidate("pear/sft", card={"heldout_nll": 0.41, ...}, num_samples=16, num_correct=array([3, 0, 16]),
                  trained_on="corpus, nll", regime="stable", after_rl=0.62)
    """

    label: str
    card: dict[str, Any]
    num_samples: int
    num_correct: np.ndarray
    trained_on: str | None
    regime: str | None
    after_rl: float | None

    def pass_at_k(self, k: int) -> np.ndarray:
        """Return pass@k of each problem, float64 [problems]."""
        return pass_at_k_by_problem(self.num_samples, self.num_correct, k)


def read_candidates(job: Job) -> tuple[dict[str, Any], list[Candidate]]:
    """Return the `SAMPLER` settings and the candidates of the job's own run and of `rank.runs`. Raise ConfigError if an
    evaluation or attempts are missing, or if evaluations are not comparable."""
    folders = {"": job.folder} | {f"{folder}:": Path(folder) for folder in job.rank.runs}
    cards: dict[Path, dict[str, Any]] = {}
    for folder in folders.values():
        path, manifest = folder / "evaluate" / "scorecard.json", folder / "manifest.json"
        if manifest.exists():
            read_document(manifest)
        try:
            cards[folder] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: expected the output of stage `evaluate`, got {error}") from error
    sampler = {key: cards[job.folder].get(key) for key in SAMPLER}
    for folder, card in cards.items():
        for key, own in sampler.items():
            field = f"{folder}/evaluate/scorecard.json: {key}"
            require(card.get(key) == own, field, f"{own}, as in {job.folder}", card.get(key))
    counts = {folder: count_correct(folder, card) for folder, card in cards.items()}
    _, problem_ids = counts[job.folder]
    candidates: list[Candidate] = []
    for prefix, folder in folders.items():
        num_correct, own_ids = counts[folder]
        expected = f"the problems of {job.folder} (tasks, evaluation.num_problems, run.seed)"
        got = f"{len(own_ids)} of which {len(set(own_ids) & set(problem_ids))} are the same"
        require(own_ids == problem_ids, f"{folder}/evaluate/attempts.parquet", expected, got)
        candidates += run_candidates(job, prefix, folder, cards[folder], num_correct)
    labels = sorted(candidate.label for candidate in candidates)
    for key in ("after_rl", "trained_on"):
        unknown = sorted(getattr(job.rank, key).keys() - set(labels))
        require(not unknown, f"rank.{key}", f"names among {labels}", unknown)
    expected = "at least two checkpoints that RL could start from (evaluation.checkpoints, rank.runs)"
    require(len(candidates) > 1, f"{job.folder}/evaluate/scorecard.json", expected, labels)
    return sampler, candidates


def count_correct(folder: Path, card: dict[str, Any]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the number of correct answers by checkpoint, int64 [problems], and the problem ids. Raise ConfigError if
    the file is missing or another, or has too many or too few answers."""
    path = folder / "evaluate" / "attempts.parquet"
    require(path.exists(), str(path), "the output of stage `evaluate`", "no file")
    try:
        table = pq.read_table(path, columns=["checkpoint", "problem_id", "correct"])
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: expected the output of stage `evaluate`: {error}") from error
    grouped = table.group_by(["checkpoint", "problem_id"]).aggregate([("correct", "sum"), ("correct", "count")])
    counts = {(row["checkpoint"], row["problem_id"]): row for row in grouped.to_pylist()}
    problem_ids = tuple(sorted({problem_id for _, problem_id in counts}))
    num_samples = card["samples_per_problem"]
    num_correct = {}
    for label in card["checkpoints"]:
        rows = [counts.get((label, problem_id), {}) for problem_id in problem_ids]
        sampled = [row.get("correct_count", 0) for row in rows]
        expected = f"{num_samples} answers to each of {len(problem_ids)} problems"
        require(set(sampled) == {num_samples}, f"{path}: checkpoint {label!r}", expected, f"{sum(sampled)} in all")
        num_correct[label] = np.array([row["correct_sum"] for row in rows], np.int64)
    return num_correct, problem_ids


def run_candidates(
    job: Job, prefix: str, folder: Path, card: dict[str, Any], num_correct: dict[str, np.ndarray]
) -> Iterator[Candidate]:
    """Yield the candidates of one run: all evaluated checkpoints except those after RL, which give the `after_rl` of
    the checkpoints that they started from."""
    config = folder / "config.json"
    own_job = job if folder == job.folder else read_job(config) if config.exists() else None
    homes = own_job.homes(folder) if own_job else {}
    after: dict[str | None, list[float]] = {}
    for label in filter(is_after_rl, num_correct):
        pass_rate = float(num_correct[label].mean()) / card["samples_per_problem"]
        after.setdefault(start_of(label, num_correct), []).append(pass_rate)
    for label in itertools.filterfalse(is_after_rl, card["checkpoints"]):
        arm, _, stage = label.rpartition("/")
        home = homes.get(arm) if stage == "sft" else None
        losses = [row for row in read_metrics(home, "sft") if "heldout_loss" in row] if home else []
        name, measured = prefix + label, float(np.mean(after[label])) if label in after else None
        yield Candidate(
            label=name,
            card=card["checkpoints"][label],
            num_samples=card["samples_per_problem"],
            num_correct=num_correct[label],
            trained_on=job.rank.trained_on.get(name) or (sft_recipe(home) if home else None),
            regime=overtraining(losses[-1]["heldout_loss"], losses[-1]["lowest_heldout_loss"]) if losses else None,
            after_rl=job.rank.after_rl.get(name, measured),
        )


def sft_recipe(home: Path) -> str | None:
    """Return data and loss of the SFT in a run folder. Includes the weights: held-out losses after weighted and plain
    SFT are not comparable."""
    path = home / "config.json"
    if not path.exists():
        return None
    job = json.loads(path.read_text())
    sft, data = job["sft"], job["corpus"]["scored_path"] or str((home / "scored").absolute())
    authors = f" of {', '.join(sft['sources'])}" if sft.get("sources") else ""
    loss = f"{sft['objective']['type']}, weights {sft['level']}, control {sft['control']}"
    return f"{data}{authors}, {loss}"
