"""From which checkpoint should RL start? What each promises, by the predictors of arXiv 2510.01624,
2606.18487 and 2512.11470, and how such promises were kept where results of RL are known.

Reads evaluations and exported weights; needs no Ray.
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
from pear_ray.rank.candidates import Candidate, CandidateSet, read
from pear_ray.rank.messages import advice, cautions
from pear_ray.rank.moves import moves
from pear_ray.run import RunDir, flatten, write_json
from pear_ray.statistics import bootstrap_interval, mean_with_interval

log = logging.getLogger(__name__)


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Write ranking.json, ranking.csv and moves.json into RUN/rank."""
    found = ranking(job, read(job))
    with run.new_folder("rank") as folder:
        write_json(folder / "ranking.json", found)
        write_json(folder / "moves.json", moves(job))
        write_table(folder / "ranking.csv", found["candidates"])
    for text in (found["advice"], *found["cautions"]):
        log.info("rank: %s", text)
    return {"first": found["candidates"][0]["label"], "advice": found["advice"]}


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line for each candidate; a cell is empty where nothing is known."""
    flat = [dict(flatten(row)) for row in rows]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
        table.writeheader()
        table.writerows(flat)


def ranking(job: Job, field: CandidateSet) -> dict[str, Any]:
    """The whole document.

    Raises:
        ConfigError: rank.k is larger than the number of samples.
    """
    k, seed = job.rank.k or max(job.evaluation.ks), job.run.seed
    if k > field.num_samples:
        raise ConfigError(
            f"rank.k: read {k}; expected at most {field.num_samples} samples per problem"
        )
    beaten = dominated(field, seed)
    standing = [c for c in field.candidates if c.label not in beaten]
    at_k = np.array([field.pass_at_k(c, k) for c in standing])
    chances = dict(
        zip((c.label for c in standing), predictors.probabilities_of_first(at_k, seed), strict=True)
    )
    order = sorted(
        field.candidates,
        key=lambda c: (c.label in beaten, -field.pass_at_k(c, k).mean(), c.label),
    )
    document: dict[str, Any] = {
        "k": k,
        "group_size": job.rl.group_size,
        "num_problems": len(field.problem_ids),
        "sampler": field.sampler,
        "candidates": [
            {
                "rank": None if c.label in beaten else place,
                **promises(job, field, c, k),
                "probability_of_first": float(chances.get(c.label, 0.0)),
                "dropped_for": beaten.get(c.label),
            }
            for place, c in enumerate(order, 1)
        ],
        "leads": leads(field, order, beaten, k, seed),
        "track_record": track_record(field, k, seed),
    }
    foretell(field, document)
    return document | {"advice": advice(document), "cautions": cautions(document)}


def dominated(field: CandidateSet, seed: int) -> dict[str, str]:
    """Candidates that RL need not start from, and who is better: in pass@1 by more than the choice
    of problems explains, and in held-out loss where the two can be compared."""
    found: dict[str, str] = {}
    for worse, better in permutations(field.candidates, 2):
        is_comparable = worse.trained_on is not None and worse.trained_on == better.trained_on
        loss, lower = (c.card.get("heldout_nll") for c in (worse, better))
        if not is_comparable or loss is None or lower is None or lower >= loss:
            continue
        lead = field.pass_at_k(better, 1) - field.pass_at_k(worse, 1)
        if bootstrap_interval(lead, seed)[0] > 0:
            found.setdefault(worse.label, better.label)
    return found


def promises(job: Job, field: CandidateSet, candidate: Candidate, k: int) -> dict[str, Any]:
    """The predictors of one candidate."""
    num_samples, group_size = field.num_samples, job.rl.group_size
    is_known = num_samples >= group_size
    counts, card = candidate.num_correct, candidate.card
    same = [c.label for c in field.candidates if c.trained_on == candidate.trained_on]
    return {
        "label": candidate.label,
        "path": card["path"],
        "pass_at_1": mean_with_interval(field.pass_at_k(candidate, 1), job.run.seed),
        "pass_at_k": mean_with_interval(field.pass_at_k(candidate, k), job.run.seed),
        "heldout_loss": card.get("heldout_nll"),
        "trained_on": candidate.trained_on,
        "loss_comparable_with": [n for n in same if candidate.trained_on and n != candidate.label],
        "regime": candidate.regime,
        "group_signal": (
            predictors.group_signal(num_samples, counts, group_size) if num_samples > 1 else None
        ),
        "share_without_signal": (
            predictors.share_without_signal(num_samples, counts, group_size) if is_known else None
        ),
        "entropy": card["entropy"],
        "completions_clipped_ratio": card["completions_clipped_ratio"],
        "after_rl": candidate.after_rl,
    }


def leads(
    field: CandidateSet, order: list[Candidate], beaten: dict[str, str], k: int, seed: int
) -> dict[str, Any]:
    """The first one's lead in pass@k over each other that was not dropped, the nearest first,
    paired over problems."""
    first, *others = (c for c in order if c.label not in beaten)
    ahead = {c.label: field.pass_at_k(first, k) - field.pass_at_k(c, k) for c in others}
    return {label: mean_with_interval(lead, seed) for label, lead in ahead.items()}


def track_record(field: CandidateSet, k: int, seed: int) -> dict[str, Any]:
    """How each predictor fared on the candidates whose result after RL is known."""
    known = [c for c in field.candidates if c.after_rl is not None]
    record: dict[str, Any] = {"num_known": len(known), "predictors": {}}
    if len(known) < predictors.FEWEST_POINTS:
        return record
    after = np.array([c.after_rl for c in known])
    at_1, at_k = (np.array([field.pass_at_k(c, n).mean() for c in known]) for n in (1, k))
    columns = {"pass@1": [at_1], f"pass@{k}": [at_k]}
    losses = [c.card.get("heldout_nll") for c in known]
    if None not in losses:
        # Of comparable losses the lower one promises more.
        promise = -np.array(losses)
        columns |= {"held-out loss": [promise], f"pass@{k} and loss": [at_k, promise]}
        record["loss_is_confounded"] = len({c.trained_on or c.label for c in known}) > 1
    for name, of in columns.items():
        together = np.mean([predictors.ranks(values) for values in of], axis=0)
        mean_and_sd = predictors.heldout_r_squared(of, after, seed)
        linear = predictors.pearson(of[0], after) if len(of) == 1 else None
        record["predictors"][name] = {
            "spearman": predictors.spearman(together, after),
            "r_squared": None if linear is None else linear**2,
            "heldout_r_squared": mean_and_sd and {"mean": mean_and_sd[0], "sd": mean_and_sd[1]},
        }
    return record


def foretell(field: CandidateSet, document: dict[str, Any]) -> None:
    """Add what the line from pass@k to known results says of each candidate."""
    rows = document["candidates"]
    known = [row for row in rows if row["after_rl"] is not None]
    if len(known) < predictors.FEWEST_POINTS:
        return
    x = np.array([row["pass_at_k"]["value"] for row in known])
    y = np.array([row["after_rl"] for row in known])
    slope, intercept = predictors.line(x, y)
    error = float(np.sqrt(np.square(y - slope * x - intercept).sum() / (len(y) - 2)))
    for row in rows:
        value = slope * row["pass_at_k"]["value"] + intercept
        row["predicted_after_rl"] = {"value": float(value), "sd": error}
