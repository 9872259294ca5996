"""How far, and in which direction, training moved a model's parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# Directions and passes of the randomised search for the largest singular value.
DIRECTIONS, PASSES = 8, 8


class ParameterStep(NamedTuple):
    """Squared Frobenius norms of a tensor before a step and of the step."""

    before: float
    step: float

    @property
    def relative(self) -> float | None:
        """||after - before|| / ||before||; None where there was nothing to move away from."""
        return math.sqrt(self.step / self.before) if self.before else None


class StepPair(NamedTuple):
    """Two steps after each other, and their inner product."""

    first: ParameterStep
    second: ParameterStep
    product: float

    @property
    def cosine(self) -> float | None:
        """1: the second step goes on like the first, -1: it undoes it; None where one is zero."""
        norms = math.sqrt(self.first.step * self.second.step)
        return self.product / norms if norms else None


def turn(start: Tensor, first_step: Tensor, second_step: Tensor) -> StepPair:
    """From `start`, float32, by one step and then another."""
    first = ParameterStep(squared(start), squared(first_step))
    second = ParameterStep(squared(start + first_step), squared(second_step))
    return StepPair(first, second, float((first_step * second_step).sum(dtype=torch.float64)))


def total(turns: Iterable[StepPair]) -> StepPair:
    """That of all tensors as one vector."""
    turns = list(turns)
    first, second = (
        ParameterStep(sum(m.before for m in moves), sum(m.step for m in moves))
        for moves in ([t.first for t in turns], [t.second for t in turns])
    )
    return StepPair(first, second, sum(t.product for t in turns))


def stable_rank(step: Tensor) -> float | None:
    """||D||_F^2 / ||D||_2^2 of a matrix: how many directions it moves in, at least 1; None where it
    does not move. The largest singular value is found by randomised subspace iteration (Halko,
    Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4), the same for the same matrix."""
    if not step.any():
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        num_directions = min(DIRECTIONS, *step.shape)
        largest = torch.svd_lowrank(step, q=num_directions, niter=PASSES)[1][0]
    return squared(step) / float(largest) ** 2


def squared(values: Tensor) -> float:
    """Sum of squares, summed in float64."""
    return float(values.square().sum(dtype=torch.float64))
