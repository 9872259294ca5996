"""Stage `rank`: choose the checkpoint that RL should start from.

    RUN/evaluate (this run, rank.runs) --> candidates --> predictors of each --> order, advice
    exported weights                   --> parameter drift of SFT and RL

Predictors of the result after RL: arXiv 2510.01624, 2606.18487 and 2512.11470; the track record measures them on
candidates whose result after RL is known. Needs no Ray.
"""

from __future__ import annotations

import csv
import logging
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from pear_ray.config import Job
from pear_ray.errors import ConfigError
from pear_ray.rank import predictors
from pear_ray.rank.candidates import Candidate, CandidateSet, read_candidates
from pear_ray.rank.drift import parameter_drift
from pear_ray.rank.messages import advice, cautions
from pear_ray.run import RunDir, flatten, write_json
from pear_ray.statistics import bootstrap_interval, mean_with_interval

log = logging.getLogger(__name__)


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Write ranking.json, ranking.csv and moves.json to RUN/rank."""
    ranking = rank_candidates(job, read_candidates(job))
    with run.new_folder("rank") as folder:
        write_json(folder / "ranking.json", ranking)
        write_json(folder / "moves.json", parameter_drift(job))
        write_csv(folder / "ranking.csv", ranking["candidates"])
    for text in (ranking["advice"], *ranking["cautions"]):
        log.info("rank: %s", text)
    return {"first": ranking["candidates"][0]["label"], "advice": ranking["advice"]}


def rank_candidates(job: Job, evaluated: CandidateSet) -> dict[str, Any]:
    """Return the content of ranking.json: candidates in order of pass@k, dominated ones last.

    Raises:
        ConfigError: rank.k is larger than the number of samples.
    """
    k, seed = job.rank.k or max(job.evaluation.ks), job.run.seed
    if k > evaluated.num_samples:
        raise ConfigError(f"rank.k: expected at most {evaluated.num_samples} samples per problem, got {k}")
    dominated = dominated_candidates(evaluated, seed)
    remaining = [c for c in evaluated.candidates if c.label not in dominated]
    at_k = np.array([evaluated.pass_at_k(c, k) for c in remaining])
    chances = predictors.probabilities_of_first(at_k, seed)
    chance_of = {c.label: float(chance) for c, chance in zip(remaining, chances, strict=True)}
    order = sorted(
        evaluated.candidates, key=lambda c: (c.label in dominated, -evaluated.pass_at_k(c, k).mean(), c.label)
    )
    document: dict[str, Any] = {
        "k": k,
        "group_size": job.rl.group_size,
        "num_problems": len(evaluated.problem_ids),
        "sampler": evaluated.sampler,
        "candidates": [
            {
                "rank": None if c.label in dominated else place,
                **candidate_row(job, evaluated, c, k),
                "probability_of_first": chance_of.get(c.label, 0.0),
                "dropped_for": dominated.get(c.label),
            }
            for place, c in enumerate(order, 1)
        ],
        "leads": leads(evaluated, order[: len(remaining)], k, seed),
        "track_record": track_record(evaluated, k, seed),
    }
    add_predictions(document["candidates"])
    return document | {"advice": advice(document), "cautions": cautions(document)}


def dominated_candidates(evaluated: CandidateSet, seed: int) -> dict[str, str]:
    """Map each dominated candidate to a better one: higher pass@1, by more than resampling the problems explains, and
    lower held-out loss after comparable SFT."""
    better_of: dict[str, str] = {}
    for worse, better in permutations(evaluated.candidates, 2):
        is_comparable = worse.trained_on is not None and worse.trained_on == better.trained_on
        loss, lower = (c.card.get("heldout_nll") for c in (worse, better))
        if not is_comparable or loss is None or lower is None or lower >= loss:
            continue
        lead = evaluated.pass_at_k(better, 1) - evaluated.pass_at_k(worse, 1)
        if bootstrap_interval(lead, seed)[0] > 0:
            better_of.setdefault(worse.label, better.label)
    return better_of


def candidate_row(job: Job, evaluated: CandidateSet, candidate: Candidate, k: int) -> dict[str, Any]:
    """Return the predictors of one candidate."""
    num_samples, group_size = evaluated.num_samples, job.rl.group_size
    num_correct, card = candidate.num_correct, candidate.card
    alike = [c.label for c in evaluated.candidates if c.trained_on == candidate.trained_on]
    signal = silent = None
    if num_samples > 1:
        signal = predictors.group_signal(num_samples, num_correct, group_size)
    if num_samples >= group_size:
        silent = predictors.share_without_signal(num_samples, num_correct, group_size)
    return {
        "label": candidate.label,
        "path": card["path"],
        "pass_at_1": mean_with_interval(evaluated.pass_at_k(candidate, 1), job.run.seed),
        "pass_at_k": mean_with_interval(evaluated.pass_at_k(candidate, k), job.run.seed),
        "heldout_loss": card.get("heldout_nll"),
        "trained_on": candidate.trained_on,
        "loss_comparable_with": [n for n in alike if candidate.trained_on and n != candidate.label],
        "regime": candidate.regime,
        "group_signal": signal,
        "share_without_signal": silent,
        "entropy": card["entropy"],
        "completions_clipped_ratio": card["completions_clipped_ratio"],
        "after_rl": candidate.after_rl,
    }


def leads(evaluated: CandidateSet, order: list[Candidate], k: int, seed: int) -> dict[str, dict[str, float]]:
    """Return the lead of the first candidate in pass@k over each other, paired over problems; the
    closest comes first."""
    first, *others = (evaluated.pass_at_k(candidate, k) for candidate in order)
    pairs = zip(order[1:], others, strict=True)
    return {c.label: mean_with_interval(first - other, seed) for c, other in pairs}


def track_record(evaluated: CandidateSet, k: int, seed: int) -> dict[str, Any]:
    """Return how well each predictor did on the candidates whose result after RL is known."""
    known = [c for c in evaluated.candidates if c.after_rl is not None]
    record: dict[str, Any] = {"num_known": len(known), "predictors": {}}
    if len(known) < predictors.MIN_POINTS:
        return record
    after = np.array([c.after_rl for c in known])
    at_1, at_k = (np.array([evaluated.pass_at_k(c, n).mean() for c in known]) for n in (1, k))
    columns = {"pass@1": [at_1], f"pass@{k}": [at_k]}
    losses = [c.card.get("heldout_nll") for c in known]
    if None not in losses:
        # A lower loss predicts a higher result.
        negative_loss = -np.array(losses)
        columns |= {"held-out loss": [negative_loss], f"pass@{k} and loss": [at_k, negative_loss]}
        record["loss_is_confounded"] = len({c.trained_on or c.label for c in known}) > 1
    for name, values in columns.items():
        record["predictors"][name] = predictors.score_predictor(values, after, seed)
    return record


def add_predictions(rows: list[dict[str, Any]]) -> None:
    """Add `predicted_after_rl` from a regression of known results after RL on pass@k."""
    known = [row for row in rows if row["after_rl"] is not None]
    if len(known) < predictors.MIN_POINTS:
        return
    x = np.array([row["pass_at_k"]["value"] for row in known])
    y = np.array([row["after_rl"] for row in known])
    slope, intercept = predictors.fit_line(x, y)
    error = float(np.sqrt(np.square(y - slope * x - intercept).sum() / (len(y) - 2)))
    for row in rows:
        value = slope * row["pass_at_k"]["value"] + intercept
        row["predicted_after_rl"] = {"value": float(value), "sd": error}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one line per candidate; unknown values are empty cells."""
    flat = [dict(flatten(row)) for row in rows]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
        table.writeheader()
        table.writerows(flat)
