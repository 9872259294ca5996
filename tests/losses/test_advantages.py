"""Group advantages against the papers' formulas in plain Python."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.losses.policy import group_advantages

KINDS = ("grpo", "dr_grpo", "rloo")
groups = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=32)


def slow_advantages(rewards, kind):
    mean = statistics.fmean(rewards)
    if kind == "nft":
        return [mean * (mean < 1) if r == 1 else -mean for r in rewards]
    if kind == "grpo":
        return [(r - mean) / (statistics.stdev(rewards) + 1e-6) for r in rewards]
    if kind == "dr_grpo":
        return [r - mean for r in rewards]
    others = [rewards[:i] + rewards[i + 1 :] for i in range(len(rewards))]
    return [r - statistics.fmean(rest) for r, rest in zip(rewards, others, strict=True)]


def compare(rewards, kind):
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), kind)
    expected = torch.tensor(slow_advantages(rewards, kind), dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(rewards=groups)
def test_formula(kind, rewards):
    compare(rewards, kind)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=32))
def test_formula_of_nft(rewards):
    compare(rewards, "nft")


def test_worked_example():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    expected = {
        "grpo": [1.5, -0.5, -0.5, -0.5],
        "dr_grpo": [0.75, -0.25, -0.25, -0.25],
        "rloo": [1.0, -1 / 3, -1 / 3, -1 / 3],
        "nft": [0.25, -0.25, -0.25, -0.25],
    }
    for kind, advantages in expected.items():
        torch.testing.assert_close(group_advantages(rewards, kind), torch.tensor(advantages), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(reward=st.floats(-1000, 1000, width=32), size=st.integers(2, 65))
def test_a_group_without_spread_has_zero_advantages(kind, reward, size):
    advantages = group_advantages(torch.full((size,), reward), kind)
    assert torch.equal(advantages.abs(), torch.zeros(size))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(rewards=groups)
def test_advantages_sum_to_zero_and_preserve_the_order(kind, rewards):
    rewards_G = torch.tensor(rewards, dtype=torch.float64)
    advantages_G = group_advantages(rewards_G, kind)
    assert abs(float(advantages_G.sum())) < 1e-7 * len(rewards)
    assert bool((advantages_G[rewards_G.argsort()].diff() >= 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_are_those_of_the_rewards(dtype):
    advantages = group_advantages(torch.tensor([0, 1, 1], dtype=dtype), "grpo")
    assert advantages.shape == (3,) and advantages.dtype == dtype


@pytest.mark.parametrize(
    ("rewards", "kind", "message"),
    [
        (torch.zeros(4), "ppo", r"^advantage: expected one of \['dr_grpo', .*\], got 'ppo'$"),
        (torch.zeros(1), "grpo", r"^rewards_G: expected .* at least 2, got shape \(1,\)$"),
        (torch.zeros(0), "rloo", r"got shape \(0,\)"),
        (torch.zeros(2, 4), "grpo", r"got shape \(2, 4\)"),
        (
            torch.tensor([0.0, 0.5, 1.0]),
            "nft",
            r"^advantage 'nft': expected rewards of 0 or 1, got \[0\.0, 0\.5, 1\.0\]$",
        ),
        (torch.tensor([1.0, float("nan")]), "nft", r"got \[1\.0, nan\]$"),
    ],
)
def test_bad_input_is_refused(rewards, kind, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, kind)
