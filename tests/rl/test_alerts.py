"""Warnings and ends of a run: exactly beyond their borders, and the same after a restart."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.rl.alerts import (
    FallingEntropy,
    LittleSignal,
    LowEntropy,
    Patience,
    TargetReached,
    reward_variance,
    threshold_pass_rate,
)


def entropies(*values, first=0):
    return [{"step": first + number, "entropy": value} for number, value in enumerate(values)]


def signal(share, rate, step=3):
    return [{"step": step, "frac_reward_zero_std": share, "pass_rate": rate}]


def evaluations(metric, *values):
    """A row of every step, and `metric` in every other."""
    rows = [{"step": number} for number in range(2 * len(values))]
    for row, value in zip(rows[1::2], values, strict=True):
        row[metric] = value
    return rows


LOSSES, RATES = "heldout_loss", "pass_rate"
SAID = [
    (
        LowEntropy(),
        entropies(0.5, 0.1799),
        "step 1: the entropy is 0.180 nats per token, below 0.18: the policy hardly explores",
    ),
    (
        FallingEntropy(),
        entropies(1.0, 0.9, 0.499, first=10),
        "step 12: the entropy has fallen to 0.499 nats per token from 1.000 at step 10, by more"
        " than 50%",
    ),
    (
        LittleSignal(8),
        signal(0.75, 0.05),
        "step 3: 75% of the groups carry no signal, more than 50%; at a pass rate of 0.050 the"
        " rewards of a group of 8 have a variance of 0.042, and below 0.083 or above 0.917 most"
        " groups have none: other problems or larger groups would teach more",
    ),
    (
        Patience(RATES, 2),
        evaluations(RATES, 0.3, 0.5, 0.5, 0.4),
        "step 7: pass_rate has not improved in 2 evaluations: its best is 0.5",
    ),
    (
        Patience(LOSSES, 2, best=min),
        evaluations(LOSSES, 3.0, 2.0, 2.5, 2.0),
        "step 7: heldout_loss has not improved in 2 evaluations: its best is 2.0",
    ),
    (
        TargetReached(RATES, 0.9),
        evaluations(RATES, 0.3, 0.9),
        "step 3: pass_rate has reached 0.9: it is 0.9",
    ),
    (
        TargetReached(LOSSES, 1.5, best=min),
        evaluations(LOSSES, 2.0, 1.25),
        "step 3: heldout_loss has reached 1.5: it is 1.25",
    ),
]
SILENT = [
    (LowEntropy(), entropies(0.1, 0.18)),
    (LowEntropy(), entropies(math.nan)),
    (LowEntropy(), [*entropies(0.1), {"step": 1}]),
    (FallingEntropy(), entropies(9.0, 1.0, 0.5, first=9)),
    (FallingEntropy(), entropies(1.0, 0.1, first=150)),
    (FallingEntropy(), entropies(1.0, 0.1, first=8)),
    (FallingEntropy(), [*entropies(1.0, 0.1, first=10), {"step": 12}]),
    (FallingEntropy(max_fall=0.8), entropies(1.0, 0.25, first=10)),
    (LittleSignal(8), signal(0.5, 0.083)),
    (LittleSignal(8, max_share=0.9), signal(0.9, 0.02)),
    (LittleSignal(8), [*signal(0.9, 0.02), {"step": 4}]),
    (Patience(RATES, 2), evaluations(RATES, 0.3, 0.5, 0.4)),
    (Patience(RATES, 2), evaluations(RATES, 0.3, 0.2, 0.4, 0.3)),
    (Patience(LOSSES, 2, best=min), evaluations(LOSSES, 3.0, 3.5, 2.0)),
    (Patience(RATES, 1), evaluations(LOSSES, 3.0, 3.5, 4.0)),
    (Patience(RATES, 2), evaluations(RATES, math.nan, 0.1, math.nan, 0.2)),
    (TargetReached(RATES, 0.9), evaluations(RATES, 0.3, 0.8999, math.nan)),
    (TargetReached(LOSSES, 1.5, best=min), evaluations(LOSSES, 2.0, 1.51)),
    (TargetReached(LOSSES, 1.5), evaluations(RATES, 2.0, 3.0)),
]
TOKENIZE_CONFIG = {type(rule).__name__: rule for rule, *_ in SAID}


@pytest.mark.parametrize(("rule", "rows", "said"), SAID, ids=[type(r).__name__ for r, *_ in SAID])
def test_said(rule, rows, said):
    assert rule(rows) == said
    # One step earlier there was nothing to say.
    assert rule(rows[:-1]) is None


@pytest.mark.parametrize(("rule", "rows"), SILENT)
def test_nothing_is_said(rule, rows):
    assert rule(rows) is None


@pytest.mark.parametrize("rule", TOKENIZE_CONFIG.values(), ids=TOKENIZE_CONFIG)
def test_before_the_first_step_there_is_nothing_to_say(rule):
    assert rule([]) is None


def test_values_that_are_not_numbers_improve_nothing():
    rule = Patience(RATES, 3)
    assert rule(evaluations(RATES, 0.3, math.nan, 0.2, math.nan)) == (
        "step 7: pass_rate has not improved in 3 evaluations: its best is 0.3"
    )
    assert rule(evaluations(RATES, *[math.nan] * 3)) == (
        "step 5: pass_rate has not improved in 3 evaluations: its best is nan"
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=14), st.integers(1, 4), st.sampled_from([max, min]))
def test_a_run_ends_when_its_newest_values_are_no_better_than_all_before(values, patience, best):
    rule = Patience(RATES, patience, best)
    ended = False
    for number in range(1, len(values) + 1):
        earlier, newest = values[: number - patience], values[number - patience : number]
        stale = number > patience and best(earlier + newest) == best(earlier)
        ended = ended or stale
        assert (rule(evaluations(RATES, *values[:number])) is not None) == ended


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=20), st.floats(0, 1))
def test_reached_stays_reached(values, border):
    rows = evaluations(RATES, *values)
    said = [
        rule_said
        for n in range(len(rows) + 1)
        if (rule_said := TargetReached(RATES, border)(rows[:n]))
    ]
    assert bool(said) == any(value >= border for value in values)
    assert len(set(said)) <= 1


@pytest.mark.parametrize(
    ("group_size", "expected"), [(2, 0.5), (4, 0.159), (8, 0.083), (16, 0.042)]
)
def test_threshold_pass_rates_of_the_paper(group_size, expected):
    found = threshold_pass_rate(group_size)
    assert found == pytest.approx(expected, abs=5e-4)
    assert (1 - found) ** group_size + found**group_size == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("group_size", [1, 0, -8])
def test_no_group_of_one(group_size):
    said = f"group_size: read {group_size}; expected at least 2"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        threshold_pass_rate(group_size)


@pytest.mark.parametrize("group_size", [2, 3, 8])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.9])
def test_reward_variance_is_that_of_all_groups_there_are(group_size, rate):
    """Each of the 2^g outcomes as often as it comes, with its own variance."""
    expected = 0.0
    for rewards in itertools.product((0, 1), repeat=group_size):
        chance = math.prod(rate if reward else 1 - rate for reward in rewards)
        expected += chance * float(np.var(rewards))
    assert reward_variance(rate, group_size) == pytest.approx(expected, abs=1e-12)
