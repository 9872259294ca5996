"""Numbers of an RL run that call for a word or for its end.

A rule maps the rows of a run so far, oldest first, to a sentence, or to None where there is nothing
to say. Rows are those of the stage in metrics.jsonl, each with its `step`; a rule passes over rows
that lack its metric. It keeps nothing itself: a run that begins again gives it the rows it has
kept. Warnings speak of the newest row alone; rules for the end (`Patience`, `Reached`) keep
saying what they have once said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class LowEntropy:
    """The mean entropy of the next token at temperature 1, in nats, is below `floor_nats`
    (arXiv 2606.18487, which measured .18 on one model: a policy this sure explores little)."""

    floor_nats: float = 0.18

    def __call__(self, rows: Sequence[Row]) -> str | None:
        newest = rows[-1:]
        if not newest or not newest[0].get("entropy", math.inf) < self.floor_nats:
            return None
        return (
            f"step {newest[0]['step']}: the entropy is {newest[0]['entropy']:.3f} nats per token,"
            f" below {self.floor_nats}: the policy hardly explores"
        )


@dataclass(frozen=True)
class FallingEntropy:
    """Until `last_step`, the entropy lies more than `max_fall` (a share) below that of the first
    row from `first_step` on (arXiv 2606.18487: such a run is better stopped)."""

    first_step: int = 10
    last_step: int = 150
    max_fall: float = 0.5

    def __call__(self, rows: Sequence[Row]) -> str | None:
        watched = [
            row
            for row in rows
            if self.first_step <= row["step"] <= self.last_step and "entropy" in row
        ]
        if not watched or watched[-1] is not rows[-1]:
            return None
        reference, newest = watched[0], watched[-1]
        if not newest["entropy"] < (1 - self.max_fall) * reference["entropy"]:
            return None
        return (
            f"step {newest['step']}: the entropy has fallen to {newest['entropy']:.3f} nats per"
            f" token from {reference['entropy']:.3f} at step {reference['step']}, by more than"
            f" {self.max_fall:.0%}"
        )


@dataclass(frozen=True)
class LittleSignal:
    """More than `max_share` of a step's groups of `group_size` answers have equal rewards, so that
    nothing is learned from them. Reads `frac_reward_zero_std` and `pass_rate`."""

    group_size: int
    max_share: float = 0.5

    def __call__(self, rows: Sequence[Row]) -> str | None:
        newest = rows[-1:]
        if not newest or not newest[0].get("frac_reward_zero_std", 0) > self.max_share:
            return None
        row, size = newest[0], self.group_size
        rate, border = row["pass_rate"], threshold_pass_rate(size)
        return (
            f"step {row['step']}: {row['frac_reward_zero_std']:.0%} of the groups carry no"
            f" signal, more than {self.max_share:.0%}; at a pass rate of {rate:.3f} the rewards of"
            f" a group of {size} have a variance of {reward_variance(rate, size):.3f}, and below"
            f" {border:.3f} or above {1 - border:.3f} most groups have none: other problems or"
            f" larger groups would teach more"
        )


@dataclass(frozen=True)
class Patience:
    """In the last `num_evaluations` rows that have `metric`, none is better than the best before
    them. `best` is `max` where more is better and `min` where less is. A value that is not a number
    is no improvement."""

    metric: str
    num_evaluations: int
    best: Callable[[float, float], float] = max

    def __call__(self, rows: Sequence[Row]) -> str | None:
        top, since = math.nan, 0
        for row in rows:
            if self.metric not in row:
                continue
            value = float(row[self.metric])
            first = math.isnan(top)
            better = not math.isnan(value) and (first or self.best(value, top) != top)
            top, since = (value, 0) if better else (top, since + 1)
            if since >= self.num_evaluations:
                return (
                    f"step {row['step']}: {self.metric} has not improved in {since} evaluations:"
                    f" its best is {top}"
                )
        return None


@dataclass(frozen=True)
class TargetReached:
    """A row's `metric` is `value` or better; `best` as in `Patience`."""

    metric: str
    value: float
    best: Callable[[float, float], float] = max

    def __call__(self, rows: Sequence[Row]) -> str | None:
        for row in rows:
            found = float(row.get(self.metric, math.nan))
            if not math.isnan(found) and self.best(found, self.value) == found:
                return f"step {row['step']}: {self.metric} has reached {self.value}: it is {found}"
        return None


def reward_variance(pass_rate: float, group_size: int) -> float:
    """Expected variance of the 0/1 rewards within a group, p (1 - p) (g - 1) / g: what there is to
    learn from (arXiv 2606.18487)."""
    return pass_rate * (1 - pass_rate) * (group_size - 1) / group_size


def threshold_pass_rate(group_size: int) -> float:
    """p*(g), the lower root of (1 - p)^g + p^g = 1/2: at a lower pass rate most groups of g answers
    are all right or all wrong (arXiv 2606.18487). .5 for g = 2, .083 for g = 8.

    Raises:
        ValueError: a group of fewer than two.
    """
    if group_size < 2:
        raise ValueError(f"group_size: read {group_size}; expected at least 2")
    low, high = 0.0, 0.5
    # The left side falls from 1 to 2^(1 - g) between them; 60 halvings exhaust a float.
    for _ in range(60):
        middle = (low + high) / 2
        most = (1 - middle) ** group_size + middle**group_size > 0.5
        low, high = (middle, high) if most else (low, middle)
    return high
