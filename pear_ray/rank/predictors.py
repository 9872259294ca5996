"""Predictors of a checkpoint's result after RL, their scores (arXiv 2510.01624, "Quagmires"), and parameter drift: how
far, and in which direction, SFT and the last training stage (called RL here) moved the parameters of each arm."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pear_ray.config import Job
from pear_ray.statistics import pass_at_k_by_problem
from pear_ray.train.hf_folder import open_tensors
from pear_ray.weights.adapters import local_folder

log = logging.getLogger(__name__)

# Known results needed to fit a line to one half and test it on the other.
MIN_POINTS = 4
NUM_SPLITS = 200
# Directions and passes of the randomized search for the largest singular value.
DIRECTIONS, PASSES = 8, 8


def group_signal(num_samples: int, num_correct: np.ndarray, group_size: int) -> float:
    """Return the expected variance of a binary reward within a group (arXiv 2606.18487): p (1 - p) (g - 1) / g, mean
    over problems, with the unbiased estimate p (1 - p) = c (n - c) / (n (n - 1)). Raise ValueError if n < 2."""
    if num_samples < 2:
        raise ValueError(f"num_samples: expected at least 2, got {num_samples}")
    correct = num_correct.astype(np.float64)
    variance = correct * (num_samples - correct) / (num_samples * (num_samples - 1))
    return float(variance.mean()) * (group_size - 1) / group_size


def share_without_signal(num_samples: int, num_correct: np.ndarray, group_size: int) -> float:
    """Return the expected share of groups that are all wrong (1 - pass@g) or all correct (the same of the wrong
    samples), unbiased. Raise ValueError if a group is larger than the sample."""
    some_correct = pass_at_k_by_problem(num_samples, num_correct, group_size)
    some_wrong = pass_at_k_by_problem(num_samples, num_samples - num_correct, group_size)
    return float(np.mean(2.0 - some_correct - some_wrong))


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return Spearman's rank correlation of [points]; None if x or y is constant."""
    from scipy import stats  # Takes a second to import.

    return float(stats.spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else None


def fit_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return slope and intercept of the least-squares line; slope 0 if x is constant."""
    from scipy import stats  # Takes a second to import.

    if not np.ptp(x):
        return 0.0, float(np.mean(y))
    line = stats.linregress(x, y)
    return float(line.slope), float(line.intercept)


def score_predictor(columns: Sequence[np.ndarray], y: np.ndarray, seed: int) -> dict[str, Any]:
    """Return Spearman, R^2 and held-out R^2 of a predictor of `y` [points]. A predictor of several columns ranks by
    their mean rank and has no R^2 of its own."""
    from scipy import stats  # Takes a second to import.

    mean_ranks = np.mean([stats.rankdata(values) for values in columns], axis=0)
    has_pearson = len(columns) == 1 and np.ptp(columns[0]) and np.ptp(y)
    return {
        "spearman": spearman(mean_ranks, y),
        "r_squared": float(stats.pearsonr(columns[0], y).statistic) ** 2 if has_pearson else None,
        "heldout_r_squared": heldout_r_squared(columns, y, seed),
    }


def heldout_r_squared(columns: Sequence[np.ndarray], y: np.ndarray, seed: int) -> dict[str, float] | None:
    """Return mean and standard deviation, over random half splits, of R^2 = 1 - SSE / SST on one half of lines fitted
    to the other. The predictions of several columns, each [points], are averaged. Splits whose test half is constant
    are skipped; None if all are, or if there are fewer points than `MIN_POINTS`."""
    if len(y) < MIN_POINTS:
        return None
    rng = np.random.default_rng(seed)
    scores = []
    for _ in range(NUM_SPLITS):
        order = rng.permutation(len(y))
        train, test = order[: len(y) // 2], order[len(y) // 2 :]
        if not np.ptp(y[test]):
            continue
        predicted = np.zeros(len(test))
        for x in columns:
            slope, intercept = fit_line(x[train], y[train])
            predicted += (slope * x[test] + intercept) / len(columns)
        unexplained = np.square(y[test] - predicted).sum()
        scores.append(1.0 - unexplained / np.square(y[test] - y[test].mean()).sum())
    return {"mean": float(np.mean(scores)), "sd": float(np.std(scores))} if scores else None


def probabilities_of_first(values: np.ndarray, seed: int, num_resamples: int = 2000) -> np.ndarray:
    """Return how often each candidate has the largest mean if problems are resampled, float64 [candidates], from
    `values` [candidates, problems]; ties share it."""
    num_problems = values.shape[1]
    chances = np.full(num_problems, 1 / num_problems)
    draws = np.random.default_rng(seed).multinomial(num_problems, chances, size=num_resamples)
    means = draws @ values.T / num_problems
    # Sums of the same numbers in another order differ in the last digit.
    is_first = means >= means.max(axis=1, keepdims=True) - 1e-12
    return (is_first / is_first.sum(axis=1, keepdims=True)).mean(axis=0)


def parameter_drift(job: Job) -> dict[str, Any]:
    """Return the drift of every trained arm: relative steps of SFT and RL, their cosine, and the same with stable ranks
    for each matrix. Empty if the base model cannot be found."""
    rows: dict[str, Any] = {}
    for name, home in job.homes(job.folder).items():
        sft, rl = (home / stage / "export" for stage in ("sft", job.last_stage_of(name)))
        if not (sft.is_dir() or rl.is_dir()):
            continue
        try:
            base = local_folder(job.model_path())
        except OSError as error:
            log.warning("rank: no parameter drift: %s not found: %s", job.model_path(), error)
            return {}
        after_sft = sft if sft.is_dir() else base
        rows[name or job.folder.name] = arm_drift(base, after_sft, rl if rl.is_dir() else None)
    return rows


def arm_drift(base: Path, after_sft: Path, after_rl: Path | None) -> dict[str, Any]:
    """Return the drift between the models of three Hugging Face folders, one tensor at a time. Skips tensors that a
    model lacks or has in another shape: some models store a tied head, others leave it out."""
    first, *others = (open_tensors(folder) for folder in (base, after_sft, after_rl or after_sft))
    has_rl = after_rl is not None
    moments: dict[str, np.ndarray] = {}
    ranks: dict[str, tuple[float | None, float | None]] = {}
    for name in [name for name in first if all(name in model for model in others)]:
        start, middle, end = (model[name].get_tensor(name).float() for model in (first, *others))
        if start.shape == middle.shape == end.shape:
            moments[name] = step_moments(start, middle - start, end - middle)
            if start.dim() == 2:
                ranks[name] = stable_rank(middle - start), stable_rank(end - middle)
    row: dict[str, Any] = relative_steps(sum(moments.values(), np.zeros(5)), has_rl)
    for index, stage in enumerate(("sft", "rl")):
        column = [pair[index] for pair in ranks.values()]
        known = [value for value in column if value is not None]
        row[f"{stage}_stable_rank_median"] = statistics.median(known) if known else None
    row["matrices"] = {
        name: relative_steps(moments[name], has_rl) | {"sft_stable_rank": sft_rank, "rl_stable_rank": rl_rank}
        for name, (sft_rank, rl_rank) in ranks.items()
    }
    return row


def step_moments(start: Tensor, sft: Tensor, rl: Tensor) -> np.ndarray:
    """Return the squared Frobenius norms of `start`, `sft`, `start` + `sft` and `rl`, and the inner product of the
    steps `sft` and `rl`, float64 [5], from float32. They add up over tensors."""
    middle = start + sft
    pairs = ((start, start), (sft, sft), (middle, middle), (rl, rl), (sft, rl))
    return np.array([float((one * other).sum(dtype=torch.float64)) for one, other in pairs])


def relative_steps(moments: np.ndarray, has_rl: bool) -> dict[str, float | None]:
    """Return ||step|| / ||before|| of both steps (None if before is 0), and the cosine of the steps: 1 if RL continues
    SFT, -1 if it undoes it, None if one is 0."""
    start, sft, middle, rl, product = moments.tolist()
    norms = math.sqrt(sft * rl)
    return {
        "sft_move": math.sqrt(sft / start) if start else None,
        "rl_move": math.sqrt(rl / middle) if has_rl and middle else None,
        "cosine": product / norms if has_rl and norms else None,
    }


def stable_rank(step: Tensor) -> float | None:
    """Return ||D||_F^2 / ||D||_2^2 of a matrix, the number of directions it moves in (at least 1); None if it is 0. The
    largest singular value comes from randomized subspace iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061,
    algorithm 4.4) with a fixed seed."""
    if not step.any():
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        largest = torch.svd_lowrank(step, q=min(DIRECTIONS, *step.shape), niter=PASSES)[1][0]
    return float(step.square().sum(dtype=torch.float64)) / float(largest) ** 2
