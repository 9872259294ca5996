"""Numbers read off samples: pass@k with intervals, and what importance weights look like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import mpmath
import numpy as np

NUM_BINS = 120
NUM_POSITIONS = 10


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of k answers drawn from `num_samples` is right, unbiased.

    1 - C(n - c, k) / C(n, k), as a product that never overflows (arXiv 2107.03374, section 2.1).

    Raises:
        ValueError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct: read {num_correct}; expected 0 to {num_samples}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k: read {k}; expected 1 to num_samples = {num_samples}")
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.prod(
        1.0 - k / i for i in range(num_samples - num_correct + 1, num_samples + 1)
    )


def mean_pass_at_k(num_samples: int, num_correct_by_problem: np.ndarray, k: int) -> np.ndarray:
    """pass@k of each problem, float64 [problems]."""
    table = np.array([pass_at_k(num_samples, c, k) for c in range(num_samples + 1)])
    return table[num_correct_by_problem]


def bootstrap_interval(
    values: np.ndarray, seed: int, num_resamples: int = 2000, coverage: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [problems], by resampling problems."""
    if len(values) == 0:
        raise ValueError("expected at least one value, read none")
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(values), size=(num_resamples, len(values)))
    means = values[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)


def mean_with_interval(values: np.ndarray, seed: int) -> dict[str, float]:
    """Mean of `values` [problems] and the ends of its 95 % bootstrap interval: value, low, high."""
    low, high = bootstrap_interval(values, seed)
    return {"value": float(values.mean()), "low": low, "high": high}


def mean_over_seeds(values: np.ndarray) -> dict[str, float]:
    """Mean of few independent runs, its standard error, and the ends of Student's 95 % interval:
    value, standard_error, low, high.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"values: read {len(values)}; expected at least two")
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    reach = student_quantile(len(values) - 1, 0.95) * error
    return {"value": mean, "standard_error": error, "low": mean - reach, "high": mean + reach}


@cache
def student_quantile(freedom: int, coverage: float) -> float:
    """The t within which the middle `coverage` of Student's distribution lies. The share outside is
    the regularised incomplete beta function I_x(freedom / 2, 1 / 2) at
    x = freedom / (freedom + t^2)."""

    def too_many(x: mpmath.mpf) -> mpmath.mpf:
        outside = mpmath.betainc(freedom / 2, 0.5, 0, x, regularized=True)
        return outside - (1 - coverage)

    x = float(mpmath.findroot(too_many, (0, 1), solver="bisect", tol=1e-15, maxsteps=100))
    return math.sqrt(freedom * (1 - x) / x)


def overtraining(loss: float, lowest: float) -> str:
    """The regime of a checkpoint by its held-out loss beside the lowest of the run: RL should start
    from a stable one, may from a mildly over-trained one (arXiv 2512.11470, sections 4-6)."""
    if loss <= 1.02 * lowest:
        return "stable"
    return "mild over-training" if loss <= 1.10 * lowest else "severe over-training"


def weight_summary(
    facts: Mapping[str, np.ndarray],
    num_tokens: int,
    clip_log_weight: tuple[float, float],
) -> dict[str, float | list[float] | dict[str, float]]:
    """Readable diagnostics of one step's importance weights, from `Weighted.facts` summed over
    micro-batches and ranks.

    `effective_sample_size` is (sum w)^2 / (sum w^2) as a share of the tokens; quantiles are those
    of a histogram in log-weight and so exact to 1/120 of the clip range.
    """
    mean_ratio = float(facts["log_ratio"]) / num_tokens
    spread = max(0.0, float(facts["log_ratio_squared"]) / num_tokens - mean_ratio**2) ** 0.5
    squared = float(facts["weight_squared"])
    counts = np.asarray(facts["tokens_by_position"])
    by_position = np.asarray(facts["weight_by_position"]) / np.maximum(counts, 1)
    sources = [key.split("/", 1)[1] for key in facts if key.startswith("first_weight/")]
    return {
        "effective_sample_size": float(facts["weight"]) ** 2 / squared / num_tokens
        if squared
        else 0.0,
        "weight_mean": float(facts["weight"]) / num_tokens,
        "log_ratio_mean": mean_ratio,
        "log_ratio_std": spread,
        **{
            place: float(facts[place]) / num_tokens
            for place in (
                "clip_frac_low",
                "clip_frac_high",
                "weight_frac_at_floor",
                "weight_frac_at_ceiling",
            )
        },
        "weight_quantiles": histogram_quantiles(facts["weight_histogram"], clip_log_weight),
        "weight_by_position": [float(v) for v in by_position],
        "first_weight_by_source": {
            source: float(facts[f"first_weight/{source}"]) / float(facts[f"sequences/{source}"])
            for source in sources
            if float(facts[f"sequences/{source}"]) > 0
        },
    }


def histogram_quantiles(
    counts: np.ndarray,
    bounds: tuple[float, float],
    quantiles: tuple[float, ...] = (0.05, 0.5, 0.95),
) -> dict[str, float]:
    """Weights below which the given shares of the tokens lie; bins are equal in log-weight."""
    cumulative = np.cumsum(counts)
    edges = np.exp(np.linspace(*bounds, len(counts) + 1))
    middles = np.sqrt(edges[1:] * edges[:-1])
    return {
        f"p{round(100 * q):02d}": float(middles[np.searchsorted(cumulative, q * cumulative[-1])])
        for q in quantiles
    }
