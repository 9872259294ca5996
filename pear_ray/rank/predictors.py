"""What a checkpoint promises before RL, and how well such promises were kept.

Pass@large-k, held-out loss and the ways of scoring a predictor: arXiv 2510.01624 ("Quagmires").
Signal of a group: arXiv 2606.18487.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pear_ray.statistics import mean_pass_at_k

FEWEST_POINTS = 4
"""Known results that a line and a test of it need: two for each."""


def group_signal(num_samples: int, num_correct_by_problem: np.ndarray, group_size: int) -> float:
    """Expected variance of a binary reward within a group, p (1 - p) (g - 1) / g averaged over
    problems; p (1 - p) unbiased from c right answers of n: c (n - c) / (n (n - 1)).

    Raises:
        ValueError: fewer than two samples.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples: read {num_samples}; expected at least 2")
    right = num_correct_by_problem.astype(np.float64)
    variance = right * (num_samples - right) / (num_samples * (num_samples - 1))
    return float(variance.mean()) * (group_size - 1) / group_size


def share_without_signal(
    num_samples: int, num_correct_by_problem: np.ndarray, group_size: int
) -> float:
    """Expected share of groups whose answers are all wrong or all right, unbiased.

    All wrong is what pass@g is the opposite of; all right is the same of wrong answers.

    Raises:
        ValueError: a group is larger than the sample.
    """
    wrong = num_samples - num_correct_by_problem
    some_right = mean_pass_at_k(num_samples, num_correct_by_problem, group_size)
    some_wrong = mean_pass_at_k(num_samples, wrong, group_size)
    return float(np.mean(2.0 - some_right - some_wrong))


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Rank correlation of two arrays [points], ties sharing their mean rank; None where all of one
    are alike."""
    return pearson(ranks(x), ranks(y))


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Linear correlation of two arrays [points]; None where all of one are alike."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Place of each value from the smallest, 1, to the largest; equal ones share their mean."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of the least-squares line; the mean of `y` where all of `x` are alike."""
    if np.ptp(x) == 0:
        return 0.0, float(np.mean(y))
    slope = float(np.cov(x, y, bias=True)[0, 1] / np.var(x))
    return slope, float(np.mean(y) - slope * np.mean(x))


def heldout_r_squared(
    predictors: Sequence[np.ndarray], y: np.ndarray, seed: int, num_splits: int = 200
) -> tuple[float, float] | None:
    """How well lines through half of the points predict the other half: mean and standard
    deviation of R^2 = 1 - SSE / SST over random half splits. Of several predictors, each [points],
    the predictions are averaged.

    A split is passed over where all of a half's `y` are alike, since nothing can be explained
    there; None where that goes for all, or points are fewer than `FEWEST_POINTS`.
    """
    if len(y) < FEWEST_POINTS:
        return None
    draw, found = np.random.default_rng(seed), []
    for _ in range(num_splits):
        order = draw.permutation(len(y))
        learned, tested = order[: len(y) // 2], order[len(y) // 2 :]
        if np.ptp(y[tested]) == 0:
            continue
        predicted = np.zeros(len(tested))
        for x in predictors:
            slope, intercept = line(x[learned], y[learned])
            predicted += (slope * x[tested] + intercept) / len(predictors)
        unexplained = np.square(y[tested] - predicted).sum()
        found.append(1.0 - unexplained / np.square(y[tested] - y[tested].mean()).sum())
    return (float(np.mean(found)), float(np.std(found))) if found else None


def probabilities_of_first(values: np.ndarray, seed: int, num_resamples: int = 2000) -> np.ndarray:
    """How often each candidate has the largest mean when problems are drawn again with
    replacement, float64 [candidates] of `values` [candidates, problems]; level ones share it."""
    num_problems = values.shape[1]
    draws = np.random.default_rng(seed).multinomial(
        num_problems, np.full(num_problems, 1 / num_problems), size=num_resamples
    )
    means = draws @ values.T / num_problems
    # Sums of the same numbers in another order differ in the last digit.
    is_first = means >= means.max(axis=1, keepdims=True) - 1e-12
    return (is_first / is_first.sum(axis=1, keepdims=True)).mean(axis=0)
