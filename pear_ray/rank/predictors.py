"""Predictors of a checkpoint's result after RL, and scores of such predictors.

pass@large-k, held-out loss and the scores of a predictor: arXiv 2510.01624 ("Quagmires"). Signal of a group: arXiv
2606.18487. scipy.stats is imported in the functions: it takes a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pear_ray.statistics import pass_at_k_by_problem

MIN_POINTS = 4
"""Known results needed to fit a line to one half and test it on the other."""


def group_signal(num_samples: int, num_correct: np.ndarray, group_size: int) -> float:
    """Return the expected variance of a binary reward within a group: p (1 - p) (g - 1) / g, mean over problems, with
    the unbiased estimate p (1 - p) = c (n - c) / (n (n - 1)).

    Raises:
        ValueError: fewer than two samples.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples: expected at least 2, got {num_samples}")
    correct = num_correct.astype(np.float64)
    variance = correct * (num_samples - correct) / (num_samples * (num_samples - 1))
    return float(variance.mean()) * (group_size - 1) / group_size


def share_without_signal(num_samples: int, num_correct: np.ndarray, group_size: int) -> float:
    """Return the expected share of groups that are all wrong (1 - pass@g) or all correct (the same of the wrong
    samples), unbiased.

    Raises:
        ValueError: a group is larger than the sample.
    """
    some_correct = pass_at_k_by_problem(num_samples, num_correct, group_size)
    some_wrong = pass_at_k_by_problem(num_samples, num_samples - num_correct, group_size)
    return float(np.mean(2.0 - some_correct - some_wrong))


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return Spearman's rank correlation of [points]; None if x or y is constant."""
    from scipy import stats

    return float(stats.spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else None


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return Pearson's correlation of [points]; None if x or y is constant."""
    from scipy import stats

    return float(stats.pearsonr(x, y).statistic) if np.ptp(x) and np.ptp(y) else None


def fit_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return slope and intercept of the least-squares line; slope 0 if x is constant."""
    from scipy import stats

    if not np.ptp(x):
        return 0.0, float(np.mean(y))
    line = stats.linregress(x, y)
    return float(line.slope), float(line.intercept)


def score_predictor(columns: Sequence[np.ndarray], y: np.ndarray, seed: int) -> dict[str, Any]:
    """Return Spearman, R^2 and held-out R^2 of a predictor of `y` [points]. A predictor of several columns ranks by
    their mean rank and has no R^2 of its own."""
    from scipy import stats

    mean_ranks = np.mean([stats.rankdata(values) for values in columns], axis=0)
    linear = pearson(columns[0], y) if len(columns) == 1 else None
    heldout = heldout_r_squared(columns, y, seed)
    return {
        "spearman": spearman(mean_ranks, y),
        "r_squared": None if linear is None else linear**2,
        "heldout_r_squared": heldout and {"mean": heldout[0], "sd": heldout[1]},
    }


def heldout_r_squared(
    columns: Sequence[np.ndarray], y: np.ndarray, seed: int, num_splits: int = 200
) -> tuple[float, float] | None:
    """Return mean and standard deviation, over random half splits, of R^2 = 1 - SSE / SST on one half of lines fitted
    to the other. The predictions of several columns, each [points], are averaged.

    Splits whose test half is constant are skipped; None if all are, or if there are fewer points than `MIN_POINTS`.
    """
    if len(y) < MIN_POINTS:
        return None
    rng = np.random.default_rng(seed)
    scores = []
    for _ in range(num_splits):
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
    return (float(np.mean(scores)), float(np.std(scores))) if scores else None


def probabilities_of_first(values: np.ndarray, seed: int, num_resamples: int = 2000) -> np.ndarray:
    """Return how often each candidate has the largest mean if problems are resampled, float64 [candidates], from
    `values` [candidates, problems]; ties share it."""
    num_problems = values.shape[1]
    draws = np.random.default_rng(seed).multinomial(
        num_problems, np.full(num_problems, 1 / num_problems), size=num_resamples
    )
    means = draws @ values.T / num_problems
    # Sums of the same numbers in another order differ in the last digit.
    is_first = means >= means.max(axis=1, keepdims=True) - 1e-12
    return (is_first / is_first.sum(axis=1, keepdims=True)).mean(axis=0)
