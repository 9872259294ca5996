"""Seeds, pass@k, confidence intervals, and summaries of importance weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np

NUM_BINS = 120
NUM_POSITIONS = 10
FRACTIONS = ("clip_frac_low", "clip_frac_high", "weight_frac_at_floor", "weight_frac_at_ceiling")


def seed_of(*parts: object) -> int:
    """Return a seed in [0, 2^31) that depends on all parts and on nothing else, in any process."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased probability that one of k samples or more is correct: 1 - C(n - c, k) / C(n, k), as a product
    that never overflows (arXiv 2107.03374, section 2.1). Raise ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct: expected 0 to {num_samples}, got {num_correct}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k: expected 1 to num_samples = {num_samples}, got {k}")
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_correct + 1, num_samples + 1))


def pass_at_k_by_problem(num_samples: int, num_correct: np.ndarray, k: int) -> np.ndarray:
    """Return pass@k of each problem, float64 [problems], from `num_correct` int64 [problems]."""
    return np.array([pass_at_k(num_samples, c, k) for c in range(num_samples + 1)])[num_correct]


def bootstrap_interval(
    values: np.ndarray, seed: int, num_resamples: int = 2000, coverage: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `values` [problems]; raise ValueError if it is empty."""
    if len(values) == 0:
        raise ValueError("values: expected at least one, got none")
    # Not scipy.stats.bootstrap: it refuses a single value, and its ends differ in the last digit.
    draws = np.random.default_rng(seed).integers(0, len(values), size=(num_resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)


def mean_with_interval(values: np.ndarray, seed: int) -> dict[str, float]:
    """Return the mean of `values` [problems] and its 95 % bootstrap interval: value, low, high."""
    low, high = bootstrap_interval(values, seed)
    return {"value": float(values.mean()), "low": low, "high": high}


def mean_over_seeds(values: np.ndarray) -> dict[str, float]:
    """Return the mean of a few independent runs, its standard error and Student's 95 % interval: value, standard_error,
    low, high. Raise ValueError if there are fewer than two."""
    from scipy import stats  # Takes over a second to import.

    if len(values) < 2:
        raise ValueError(f"values: expected at least two, got {len(values)}")
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return {"value": mean, "standard_error": error, "low": mean - reach, "high": mean + reach}


def overtraining(loss: float, lowest: float) -> str:
    """Return the regime of a checkpoint, given its held-out loss and the lowest of the run: RL should start from a
    stable one, may from a mildly over-trained one (arXiv 2512.11470, sections 4-6)."""
    if loss <= 1.02 * lowest:
        return "stable"
    return "mild over-training" if loss <= 1.10 * lowest else "severe over-training"


def weight_summary(
    sums: Mapping[str, np.ndarray], num_tokens: int, clip_log_weight: tuple[float, float]
) -> dict[str, float | list[float] | dict[str, float]]:
    """Return metrics of one step's importance weights, from `Weighted.weight_sums` over all micro-batches and ranks:
    `effective_sample_size` is (sum w)^2 / (sum w^2) / tokens, and quantiles are exact to 1/120 of the clip range."""
    mean_log_ratio = float(sums["log_ratio"]) / num_tokens
    variance = float(sums["log_ratio_squared"]) / num_tokens - mean_log_ratio**2
    weight, squared = float(sums["weight"]), float(sums["weight_squared"])
    by_position = np.asarray(sums["weight_by_position"]) / np.maximum(np.asarray(sums["tokens_by_position"]), 1)
    prefix = "sequences/"
    sources = [name.removeprefix(prefix) for name, n in sums.items() if name.startswith(prefix) and n > 0]
    return {
        "effective_sample_size": weight**2 / squared / num_tokens if squared else 0.0,
        "weight_mean": weight / num_tokens,
        "log_ratio_mean": mean_log_ratio,
        "log_ratio_std": max(0.0, variance) ** 0.5,
        **{name: float(sums[name]) / num_tokens for name in FRACTIONS},
        "weight_quantiles": histogram_quantiles(sums["weight_histogram"], clip_log_weight),
        "weight_by_position": [float(v) for v in by_position],
        "first_weight_by_source": {s: float(sums[f"first_weight/{s}"] / sums[f"sequences/{s}"]) for s in sources},
        "clip_frac_low_by_source": {s: float(sums[f"clipped_low/{s}"] / sums[f"tokens/{s}"]) for s in sources},
    }


def histogram_quantiles(
    counts: np.ndarray, bounds: tuple[float, float], quantiles: tuple[float, ...] = (0.05, 0.5, 0.95)
) -> dict[str, float]:
    """Return quantiles of the weights; bins have equal width in log-weight."""
    cumulative = np.cumsum(counts)
    edges = np.exp(np.linspace(*bounds, len(counts) + 1))
    middles = np.sqrt(edges[1:] * edges[:-1])
    return {
        f"p{round(100 * q):02d}": float(middles[np.searchsorted(cumulative, q * cumulative[-1])]) for q in quantiles
    }
