"""Seeds depend on their parts alone; pass@k against fractions, intervals against simulation, weights against numpy."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from pear_ray.losses import LossInputs
from pear_ray.losses.pear import Pear
from pear_ray.losses.sft import Weighted
from pear_ray.statistics import (
    NUM_BINS,
    NUM_POSITIONS,
    bootstrap_interval,
    histogram_quantiles,
    mean_over_seeds,
    pass_at_k,
    pass_at_k_by_problem,
    seed_of,
    weight_summary,
)

CLIP = (-10.0, 5.0)
SOURCES = ("teacher_plain", "teacher_cipher", "absent")


def test_a_seed_never_changes():
    """Runs of an earlier version stay repeatable."""
    assert seed_of(0, "score", "tutor") == 208573771
    assert seed_of() == 1910006305


def test_same_in_another_process():
    for hash_seed in ("1", "2"):
        printed = subprocess.run(
            [sys.executable, "-c", "from pear_ray.statistics import seed_of; print(seed_of(3, 'rl', (1, 'x')))"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        assert int(printed) == seed_of(3, "rl", (1, "x"))


def test_every_part_counts_and_so_does_their_order():
    parts = list(itertools.product(range(40), ("sft", "rl"), ("a", "b", ""), range(5)))
    assert len({seed_of(*part) for part in parts}) == len(parts)
    assert seed_of("a", "b") != seed_of("b", "a")
    assert seed_of("ab", "c") != seed_of("a", "bc")


def test_range_and_spread():
    """In [0, 2^31), which every generator takes; no half of it is favored."""
    seeds = [seed_of("spread", number) for number in range(4000)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert 1800 < sum(seed < 2**30 for seed in seeds) < 2200
    assert 1800 < sum(seed % 2 for seed in seeds) < 2200


def test_pass_at_k_equals_the_exact_fraction():
    for n in range(1, 65):
        for c in range(n + 1):
            for k in range(1, n + 1):
                exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
                assert abs(pass_at_k(n, c, k) - float(exact)) < 1e-13, (n, c, k)


@pytest.mark.parametrize("k", [1, 2, 8, 64, 256])
def test_pass_at_k_equals_the_exact_quotient_up_to_256_samples(k):
    """Integers divided once, which Python rounds correctly."""
    for n in range(k, 257, 1 if k == 256 else 3):
        total = math.comb(n, k)
        for c in range(n + 1):
            exact = (total - math.comb(n - c, k)) / total
            assert abs(pass_at_k(n, c, k) - exact) < 1e-13, (n, c, k)


def test_pass_at_k_is_stable_when_binomials_overflow():
    exact = 1 - Fraction(math.comb(9_999, 5_000), math.comb(10_000, 5_000))
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(float(exact), rel=1e-12)
    assert pass_at_k(10_000, 0, 10_000) == 0.0
    assert pass_at_k(10_000, 1, 10_000) == 1.0


def test_pass_at_k_increases_with_k_and_with_correct_answers():
    table = np.array([[pass_at_k(24, c, k) for k in range(1, 25)] for c in range(25)], dtype=np.float64)
    assert (np.diff(table, axis=1) >= 0).all() and (np.diff(table, axis=0) >= 0).all()
    np.testing.assert_allclose(table[:, 0], np.arange(25) / 24, atol=1e-15)
    assert (table[0] == 0).all() and (table[24] == 1).all()


def test_pass_at_k_is_unbiased():
    """The mean over many draws of 6 samples is the probability that one of 4 is correct."""
    rng = np.random.default_rng(0)
    estimates = pass_at_k_by_problem(6, rng.binomial(6, 0.2, size=40_000), 4)
    assert abs(estimates.mean() - (1 - 0.8**4)) < 5 * estimates.std() / math.sqrt(40_000)


def test_pass_at_k_by_problem():
    num_correct = np.array([0, 3, 8, 1, 3])
    found = pass_at_k_by_problem(8, num_correct, 2)
    assert found.dtype == np.float64
    assert found.tolist() == [pass_at_k(8, c, 2) for c in num_correct]


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, 5, 1, "^num_correct: expected 0 to 4, got 5$"),
        (4, -1, 1, "num_correct: .*got -1"),
        (4, 2, 0, "^k: expected 1 to num_samples = 4, got 0$"),
        (4, 2, 5, "k: .*got 5"),
        (0, 0, 1, "k: .*got 1"),
    ],
)
def test_pass_at_k_refuses(n, c, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


def test_bootstrap_interval_has_its_coverage():
    rng = np.random.default_rng(1)
    covered = 0
    for experiment in range(400):
        chance = rng.beta(0.6, 1.4, size=80)
        values = rng.binomial(8, chance) / 8
        low, high = bootstrap_interval(values, experiment, num_resamples=500)
        assert low <= values.mean() <= high
        covered += low <= 0.3 <= high
    # Three standard errors of 400 experiments at 95% are 3.3 points; small samples cost one more.
    assert 0.905 <= covered / 400 <= 0.985


def test_bootstrap_interval_has_the_theoretical_width():
    values = np.random.default_rng(2).normal(size=400)
    low, high = bootstrap_interval(values, 0, num_resamples=4000)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    narrow = bootstrap_interval(values, 0, num_resamples=4000, coverage=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.674 * values.std() / 20, rel=0.08)


def test_bootstrap_interval_depends_on_the_seed_alone():
    values = np.random.default_rng(3).random(30)
    assert bootstrap_interval(values, 5) == bootstrap_interval(values, 5)
    assert bootstrap_interval(values, 5) != bootstrap_interval(values, 6)
    assert bootstrap_interval(np.full(30, 0.25), 5) == (0.25, 0.25)
    with pytest.raises(ValueError, match="expected at least one, got none"):
        bootstrap_interval(np.array([]), 0)


def random_tokens(rng, lengths):
    """Return trainable tokens of responses from two sources, with weights within the clips."""
    num_tokens = int(np.sum(lengths))
    logprobs = -torch.from_numpy(rng.exponential(1.0, num_tokens))
    origins = tuple(SOURCES[i % 2] for i in range(len(lengths)))
    tokens = LossInputs(
        logprobs=logprobs,
        entropies=torch.zeros(num_tokens),
        sampled_logprobs=logprobs - torch.from_numpy(rng.normal(0, 0.3, num_tokens)),
        coefficients=torch.ones(num_tokens),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        origins=origins,
        num_tokens_global=num_tokens,
        num_sequences_global=len(lengths),
    )
    log_weights = np.clip(rng.normal(-1, 4, num_tokens), *CLIP)
    return tokens, torch.from_numpy(np.exp(log_weights))


def summary_of(weights, tokens):
    objective = Weighted(weigh=Pear("token", clip_log_weight=CLIP), sources=SOURCES)
    sums = {name: value.numpy() for name, value in objective.weight_sums(weights, tokens).items()}
    return weight_summary(sums, len(weights), CLIP)


def test_weight_summary_equals_numpy_on_the_raw_weights():
    rng = np.random.default_rng(4)
    lengths = [37, 1, 80, 9, 26]
    tokens, weights = random_tokens(rng, lengths)
    summary = summary_of(weights, tokens)
    raw = weights.numpy()
    ratios = (tokens.logprobs - tokens.sampled_logprobs).numpy()
    expected = {
        "effective_sample_size": raw.sum() ** 2 / (raw**2).sum() / len(raw),
        "weight_mean": raw.mean(),
        "log_ratio_mean": ratios.mean(),
        "log_ratio_std": ratios.std(),
        "clip_frac_low": (ratios <= -0.08).mean(),
        "clip_frac_high": (ratios >= 0.3).mean(),
        "weight_frac_at_floor": np.isclose(np.log(raw), CLIP[0]).mean(),
        "weight_frac_at_ceiling": np.isclose(np.log(raw), CLIP[1]).mean(),
    }
    assert expected["weight_frac_at_floor"] > 0 and expected["weight_frac_at_ceiling"] > 0
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value, rel=1e-9), name
    firsts = raw[np.cumsum(lengths) - lengths]
    assert summary["first_weight_by_source"] == {
        "teacher_plain": pytest.approx(firsts[[0, 2, 4]].mean()),
        "teacher_cipher": pytest.approx(firsts[[1, 3]].mean()),
    }
    owners = np.repeat([0, 1, 0, 1, 0], lengths)
    assert summary["clip_frac_low_by_source"] == {
        source: pytest.approx((ratios[owners == number] <= -0.08).mean()) for number, source in enumerate(SOURCES[:2])
    }
    shares = np.concatenate([np.arange(length) / length for length in lengths])
    for tenth, mean in enumerate(summary["weight_by_position"]):
        members = np.floor(shares * NUM_POSITIONS + 1e-9) == tenth
        assert mean == pytest.approx(raw[members].mean() if members.any() else 0.0), tenth


def test_quantiles_are_exact_to_half_a_bin():
    rng = np.random.default_rng(5)
    tokens, weights = random_tokens(rng, [997])
    quantiles = summary_of(weights, tokens)["weight_quantiles"]
    half_a_bin = (CLIP[1] - CLIP[0]) / NUM_BINS / 2
    assert list(quantiles) == ["p05", "p50", "p95"]
    for name, share in zip(quantiles, (0.05, 0.5, 0.95), strict=True):
        exact = np.quantile(weights.numpy(), share, method="inverted_cdf")
        assert abs(math.log(quantiles[name] / exact)) <= half_a_bin * (1 + 1e-9), name


def test_histogram_quantiles_of_one_full_bin():
    counts = np.zeros(15)
    counts[9] = 40
    found = histogram_quantiles(counts, CLIP, (0.1, 0.9))
    assert found == {"p10": pytest.approx(math.exp(-0.5)), "p90": pytest.approx(math.exp(-0.5))}


def test_uniform_weights_have_full_effective_sample_size():
    tokens, weights = random_tokens(np.random.default_rng(6), [20, 20])
    assert summary_of(torch.full_like(weights, 0.3), tokens)["effective_sample_size"] == (pytest.approx(1.0))
    lonely = torch.full_like(weights, math.exp(-10))
    lonely[7] = 100.0
    assert summary_of(lonely, tokens)["effective_sample_size"] == pytest.approx(1 / 40, rel=1e-3)


@pytest.mark.parametrize(("num_seeds", "quantile"), [(2, 12.7062), (3, 4.3027), (4, 3.1824), (8, 2.3646), (31, 2.0423)])
def test_interval_over_seeds_uses_the_tabulated_student_quantile(num_seeds, quantile):
    summary = mean_over_seeds(np.random.default_rng(num_seeds).normal(size=num_seeds))
    reach = (summary["high"] - summary["low"]) / 2
    assert reach / summary["standard_error"] == pytest.approx(quantile, abs=1e-4)


def test_interval_over_seeds_has_its_coverage():
    draws = np.random.default_rng(0).normal(0.3, 0.1, size=(600, 4))
    summaries = [mean_over_seeds(values) for values in draws]
    covered = np.mean([one["low"] <= 0.3 <= one["high"] for one in summaries])
    assert covered == pytest.approx(0.95, abs=0.03)


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="expected at least two, got 1"):
        mean_over_seeds(np.array([0.5]))
