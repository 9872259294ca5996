"""Alerts and early stopping, exactly beyond their thresholds."""

from __future__ import annotations

import math
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.rl.monitor import falling_entropy, little_signal, low_entropy, stop_reason, threshold_pass_rate


def entropies(*values, first=0):
    return [{"step": first + number, "entropy": value} for number, value in enumerate(values)]


def signal(frac, rate, step=3):
    return [{"step": step, "frac_reward_zero_std": frac, "pass_rate": rate}]


def evaluations(*pass_rates):
    """Return a row for every step, with an evaluation in every other."""
    rows = [{"step": number} for number in range(2 * len(pass_rates))]
    for row, pass_rate in zip(rows[1::2], pass_rates, strict=True):
        row["pass_at_1"] = pass_rate
    return rows


little_signal_of_8 = partial(little_signal, group_size=8)
stops_after_2 = partial(stop_reason, patience=2, target=None)
stops_at_09 = partial(stop_reason, patience=0, target=0.9)
ALERTS = {
    "low_entropy": (
        low_entropy,
        entropies(0.5, 0.1799),
        "step 1: entropy is 0.180 nats per token, below 0.18: the policy hardly explores",
    ),
    "falling_entropy": (
        falling_entropy,
        entropies(1.0, 0.9, 0.499, first=10),
        "step 12: entropy fell to 0.499 nats per token from 1.000 at step 10, by more than 50%",
    ),
    "little_signal": (
        little_signal_of_8,
        [{"step": 2}, *signal(0.75, 0.05)],
        "step 3: 75% of the groups have equal rewards, more than 50%; the pass rate is 0.050, and"
        " below 0.083 or above 0.917 most groups of 8 have: use other problems or larger groups",
    ),
    "patience": (
        stops_after_2,
        evaluations(0.3, 0.5, 0.5, 0.4),
        "step 7: pass_at_1 has not improved in 2 evaluations: its best is 0.5",
    ),
    "target": (stops_at_09, evaluations(0.3, 0.9), "step 3: pass_at_1 reached 0.9: it is 0.9"),
}
SILENT = [
    (low_entropy, entropies(0.1, 0.18)),
    (low_entropy, entropies(math.nan)),
    (low_entropy, [*entropies(0.1), {"step": 1}]),
    (falling_entropy, entropies(9.0, 1.0, 0.5, first=9)),
    (falling_entropy, entropies(1.0, 0.1, first=150)),
    (falling_entropy, entropies(1.0, 0.1, first=8)),
    (falling_entropy, [*entropies(1.0, 0.1, first=10), {"step": 12}]),
    (partial(falling_entropy, max_fall=0.8), entropies(1.0, 0.25, first=10)),
    (little_signal_of_8, signal(0.5, 0.083)),
    (partial(little_signal_of_8, max_frac=0.9), signal(0.9, 0.02)),
    (little_signal_of_8, [*signal(0.9, 0.02), {"step": 4}]),
    (stops_after_2, evaluations(0.3, 0.5, 0.4)),
    (stops_after_2, evaluations(0.3, 0.2, 0.4, 0.3)),
    (stops_after_2, evaluations()),
    (stops_at_09, evaluations(0.3, 0.8999)),
    (partial(stop_reason, patience=0, target=None), evaluations(1.0, 0.5, 0.4)),
]


@pytest.mark.parametrize(("rule", "rows", "message"), ALERTS.values(), ids=ALERTS)
def test_a_rule_returns_its_message_at_the_first_row_that_breaks_it(rule, rows, message):
    assert rule(rows) == message
    assert rule(rows[:-1]) is None


@pytest.mark.parametrize(("rule", "rows"), SILENT)
def test_a_rule_returns_none_within_its_thresholds(rule, rows):
    assert rule(rows) is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=14), st.integers(1, 4))
def test_a_run_stops_once_its_last_evaluations_are_no_better_than_all_before(values, patience):
    for number in range(1, len(values) + 1):
        earlier, newest = values[: number - patience], values[number - patience : number]
        is_stale = number > patience and max(earlier + newest) == max(earlier)
        reason = stop_reason(evaluations(*values[:number]), patience, None)
        assert (reason is not None) == is_stale
        if is_stale:
            return


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=20), st.floats(0, 1))
def test_a_reached_target_stays_reached(values, target):
    rows = evaluations(*values)
    reasons = [stop_reason(rows[:n], 0, target) for n in range(len(rows) + 1)]
    assert any(reasons) == any(value >= target for value in values)
    assert len(set(filter(None, reasons))) <= 1


@pytest.mark.parametrize(("group_size", "expected"), [(2, 0.5), (4, 0.159), (8, 0.083), (16, 0.042)])
def test_threshold_pass_rates_are_those_of_the_paper(group_size, expected):
    rate = threshold_pass_rate(group_size)
    assert rate == pytest.approx(expected, abs=5e-4)
    assert (1 - rate) ** group_size + rate**group_size == pytest.approx(0.5, abs=1e-12)


def test_a_pass_rate_of_nan_is_no_improvement():
    rows = [{"step": step, "pass_at_1": rate} for step, rate in enumerate((math.nan, 0.2, math.nan, 0.1))]
    assert stop_reason(rows, 3, None) is None
    assert stop_reason(rows, 2, None) is not None
    assert stop_reason(rows[:1], 1, None) is not None
