"""Stage `rank`: choose the checkpoint that RL should start from.

    RUN/evaluate (this run, rank.runs) --> candidates --> predictors of each --> order, advice
    exported weights                   --> parameter drift of SFT and RL

Predictors of the result after RL: arXiv 2510.01624, 2606.18487 and 2512.11470; the track record measures them on
candidates whose result after RL is known. Needs no Ray.
"""

from __future__ import annotations

import csv
import logging
import math
from itertools import permutations
from typing import Any

import numpy as np

from pear_ray.config import Job
from pear_ray.errors import require
from pear_ray.rank import predictors
from pear_ray.rank.candidates import Candidate, read_candidates
from pear_ray.run import RunDir, atomic_folder, flatten, write_json
from pear_ray.statistics import bootstrap_interval, mean_with_interval

log = logging.getLogger(__name__)

# Below it RL hardly explored, for one 3 B teacher_cipher model (arXiv 2606.18487).
LOW_ENTROPY_NATS = 0.18
# The pass@large-k that was shown to predict results of RL (arXiv 2510.01624).
LARGE_K, MANY_SAMPLES = 64, 256
LARGE_SHARE = 0.5


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Write ranking.json, ranking.csv and moves.json to RUN/rank."""
    ranking = rank_candidates(job)
    with atomic_folder(run.folder / "rank") as folder:
        write_json(folder / "ranking.json", ranking)
        write_json(folder / "moves.json", predictors.parameter_drift(job))
        # One line per candidate; unknown values are empty cells.
        rows = [dict(flatten(row)) for row in ranking["candidates"]]
        with (folder / "ranking.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            table.writeheader()
            table.writerows(rows)
    for text in (ranking["advice"], *ranking["cautions"]):
        log.info("rank: %s", text)
    return {"first": ranking["candidates"][0]["label"], "advice": ranking["advice"]}


def rank_candidates(job: Job) -> dict[str, Any]:
    """Return the content of ranking.json: candidates in order of pass@k, dominated ones last. Raise ConfigError if
    rank.k is larger than the number of samples."""
    sampler, candidates = read_candidates(job)
    k, seed, num_samples = job.rank.k or max(job.evaluation.ks), job.run.seed, candidates[0].num_samples
    require(k <= num_samples, "rank.k", f"at most {num_samples} samples per problem", k)
    dominated = dominated_candidates(candidates, seed)
    remaining = [c for c in candidates if c.label not in dominated]
    chances = predictors.probabilities_of_first(np.array([c.pass_at_k(k) for c in remaining]), seed)
    chance_of = dict(zip([c.label for c in remaining], chances.tolist(), strict=True))
    order = sorted(candidates, key=lambda c: (c.label in dominated, -c.pass_at_k(k).mean(), c.label))
    first, *others = order[: len(remaining)]
    document: dict[str, Any] = {
        "k": k,
        "group_size": job.rl.group_size,
        "num_problems": len(first.num_correct),
        "sampler": sampler,
        "candidates": [
            {
                "rank": None if c.label in dominated else place,
                **candidate_row(job, c, candidates, k),
                "probability_of_first": chance_of.get(c.label, 0.0),
                "dropped_for": dominated.get(c.label),
            }
            for place, c in enumerate(order, 1)
        ],
        # The lead of the first candidate over each other, paired over problems; the closest comes first.
        "leads": {c.label: mean_with_interval(first.pass_at_k(k) - c.pass_at_k(k), seed) for c in others},
        "track_record": track_record(candidates, k, seed),
    }
    add_predictions(document["candidates"])
    return document | {"advice": advice(document), "cautions": cautions(document)}


def dominated_candidates(candidates: list[Candidate], seed: int) -> dict[str, str]:
    """Map each dominated candidate to a better one: higher pass@1, by more than resampling the problems explains, and
    lower held-out loss after comparable SFT."""
    better_of: dict[str, str] = {}
    for worse, better in permutations(candidates, 2):
        is_comparable = worse.trained_on is not None and worse.trained_on == better.trained_on
        loss, lower = (c.card.get("heldout_nll") for c in (worse, better))
        if not is_comparable or loss is None or lower is None or lower >= loss:
            continue
        if bootstrap_interval(better.pass_at_k(1) - worse.pass_at_k(1), seed)[0] > 0:
            better_of.setdefault(worse.label, better.label)
    return better_of


def candidate_row(job: Job, candidate: Candidate, candidates: list[Candidate], k: int) -> dict[str, Any]:
    """Return the predictors of one candidate."""
    card, answers = candidate.card, (candidate.num_samples, candidate.num_correct, job.rl.group_size)
    alike = [c.label for c in candidates if c.trained_on == candidate.trained_on]
    has_groups = candidate.num_samples >= job.rl.group_size
    return {
        "label": candidate.label,
        "path": card["path"],
        "pass_at_1": mean_with_interval(candidate.pass_at_k(1), job.run.seed),
        "pass_at_k": mean_with_interval(candidate.pass_at_k(k), job.run.seed),
        "heldout_loss": card.get("heldout_nll"),
        "trained_on": candidate.trained_on,
        "loss_comparable_with": [n for n in alike if candidate.trained_on and n != candidate.label],
        "regime": candidate.regime,
        "group_signal": predictors.group_signal(*answers) if candidate.num_samples > 1 else None,
        "share_without_signal": predictors.share_without_signal(*answers) if has_groups else None,
        "entropy": card["entropy"],
        "completions_clipped_ratio": card["completions_clipped_ratio"],
        "after_rl": candidate.after_rl,
    }


def track_record(candidates: list[Candidate], k: int, seed: int) -> dict[str, Any]:
    """Return how well each predictor did on the candidates whose result after RL is known."""
    known = [c for c in candidates if c.after_rl is not None]
    record: dict[str, Any] = {"num_known": len(known), "predictors": {}}
    if len(known) < predictors.MIN_POINTS:
        return record
    after = np.array([c.after_rl for c in known])
    at_1, at_k = (np.array([c.pass_at_k(n).mean() for c in known]) for n in (1, k))
    columns = {"pass@1": [at_1], f"pass@{k}": [at_k]}
    losses = [c.card.get("heldout_nll") for c in known]
    if None not in losses:
        # A lower loss predicts a higher result.
        negative_loss = -np.array(losses)
        columns |= {"held-out loss": [negative_loss], f"pass@{k} and loss": [at_k, negative_loss]}
        record["loss_is_confounded"] = len({c.trained_on or c.label for c in known}) > 1
    record["predictors"] = {name: predictors.score_predictor(x, after, seed) for name, x in columns.items()}
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
        row["predicted_after_rl"] = {"value": float(slope * row["pass_at_k"]["value"] + intercept), "sd": error}


def advice(document: dict[str, Any]) -> str:
    """Return where to start RL, and how certain that is."""
    rows, k, num_problems = document["candidates"], document["k"], document["num_problems"]
    best = next(row for row in rows if row["rank"] is not None)
    values = {row["pass_at_k"]["value"] for row in rows}
    if values in ({0.0}, {1.0}):
        solved, wanted = ("no", "easier") if values == {0.0} else ("every", "harder")
        return (
            f"These {num_problems} problems do not separate the candidates: each solves {solved} problem in"
            f" {document['sampler']['samples_per_problem']} samples. Evaluate on {wanted} ones."
        )
    score = f"pass@{k} {format_interval(best['pass_at_k'])}"
    tied = [name for name, lead in document["leads"].items() if lead["low"] <= 0]
    if tied:
        text = (
            f"{best['label']} has the highest {score}, but on {num_problems} problems it is not significantly ahead of"
            f" {' and '.join(tied)}: start RL from the cheapest of them, or evaluate on more problems."
        )
    else:
        text = f"Start RL from {best['label']}, which has the highest {score}"
        if document["leads"]:
            nearest, lead = next(iter(document["leads"].items()))
            text += f", ahead of {nearest} by {format_interval(lead, '+')}"
        text += f"; it stays first in {best['probability_of_first']:.0%} of resamples of problems."
    return f"{text} {track_record_text(document)}"


def track_record_text(document: dict[str, Any]) -> str:
    """Return how well the ranking's predictor did so far."""
    num_known, predictor = document["track_record"]["num_known"], f"pass@{document['k']}"
    scores = document["track_record"]["predictors"].get(predictor)
    if scores is None:
        return f"Only {num_known} results after RL are known, too few to score {predictor} here."
    if scores["spearman"] is None:
        return f"The {num_known} known results after RL are all equal."
    text = f"On {num_known} known results after RL, {predictor} has Spearman {scores['spearman']:.2f}"
    if heldout := scores["heldout_r_squared"]:
        text += f" and held-out R^2 {heldout['mean']:.2f} +- {heldout['sd']:.2f}"
    return f"{text}."


def cautions(document: dict[str, Any]) -> list[str]:
    """Return the caveats of the ranking and of each candidate, in sentences that claim no more than the numbers."""
    rows, k, texts = document["candidates"], document["k"], []
    if k < LARGE_K:
        texts.append(
            f"pass@{k} of {document['sampler']['samples_per_problem']} samples stands in for pass@{LARGE_K} of"
            f" {MANY_SAMPLES}, which was validated as a predictor."
        )
    alone = [row["label"] for row in rows if row["heldout_loss"] is not None and not row["loss_comparable_with"]]
    if alone:
        texts.append(
            f"Held-out loss was not used for {', '.join(alone)}: it is comparable only between checkpoints trained on"
            " the same data with the same loss (rank.trained_on)."
        )
    if document["track_record"].get("loss_is_confounded"):
        texts.append(
            "The track record of held-out loss is confounded: the checkpoints with known results were trained on"
            " different data or with different losses."
        )
    for row in rows:
        silent, clipped = row["share_without_signal"] or 0.0, row["completions_clipped_ratio"]
        entropy = math.inf if row["entropy"] is None else row["entropy"]
        caveats = {
            f"dropped because {row['dropped_for']} has better pass@1 and held-out loss.": row["dropped_for"],
            f"expect {silent:.0%} of groups of {document['group_size']} to be all correct or all wrong, without"
            " learning signal; choose other problems or larger groups.": silent > LARGE_SHARE,
            f"entropy {entropy:.3f} nats per token is below {LOW_ENTROPY_NATS}; RL may have little left to explore.": (
                entropy < LOW_ENTROPY_NATS
            ),
            "held-out loss is over 1.10 times its lowest; stop SFT earlier.": row["regime"] == "severe over-training",
            f"{clipped:.0%} of completions were truncated at the maximum length.": clipped > LARGE_SHARE,
        }
        texts += [f"{row['label']}: {text}" for text, applies in caveats.items() if applies]
    return texts


def format_interval(score: dict[str, float], sign: str = "") -> str:
    """Return a value with its interval, such as "0.441 [0.379, 0.500]"."""
    return f"{score['value']:{sign}.3f} [{score['low']:{sign}.3f}, {score['high']:{sign}.3f}]"
