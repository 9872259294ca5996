"""Moves of parameters against numpy on all of them at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pear_ray.rank import drift

SHAPES = [(7, 5), (3,), (20, 4)]


def models(seed=0):
    """Three models of three tensors."""
    draw = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=draw) for shape in SHAPES] for _ in range(3)]


def flat(model):
    return np.concatenate([tensor.double().numpy().ravel() for tensor in model])


def test_all_tensors_together_are_one_vector():
    start, middle, end = models()
    threes = zip(start, middle, end, strict=True)
    found = drift.total(drift.turn(one, two - one, three - two) for one, two, three in threes)
    a, b, c = map(flat, (start, middle, end))
    norm = np.linalg.norm
    assert found.first.relative == pytest.approx(norm(b - a) / norm(a))
    assert found.second.relative == pytest.approx(norm(c - b) / norm(b))
    cosine = (b - a) @ (c - b) / norm(b - a) / norm(c - b)
    assert found.cosine == pytest.approx(cosine)


@pytest.mark.parametrize("factor, cosine", [(0.5, 1.0), (-0.25, -1.0)])
def test_going_on_and_going_back(factor, cosine):
    start, step = torch.ones(4, 4), torch.arange(16.0).reshape(4, 4)
    found = drift.turn(start, step, factor * step)
    assert found.cosine == pytest.approx(cosine)
    assert found.second.step == pytest.approx(factor**2 * found.first.step)


def test_what_does_not_move_has_no_direction():
    still = torch.ones(3, 3)
    found = drift.turn(still, torch.zeros(3, 3), still)
    assert found.cosine is None and found.first.relative == 0.0
    assert drift.stable_rank(torch.zeros(3, 3)) is None
    assert drift.turn(torch.zeros(2), torch.ones(2), torch.ones(2)).first.relative is None


def test_small_steps_of_bfloat16_weights_are_not_rounded_away():
    before = torch.full((64,), 1.0, dtype=torch.bfloat16)
    after = before.clone()
    after[0] += 2**-7
    step = after.float() - before.float()
    assert drift.turn(before.float(), step, step).first.step == 2.0**-14


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (200, 3), (1, 9), (2, 2)])
def test_stable_rank_is_that_of_all_singular_values(shape):
    step = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = np.linalg.svd(step.double().numpy(), compute_uv=False)
    expected = (values**2).sum() / values[0] ** 2
    assert drift.stable_rank(step) == pytest.approx(expected, rel=1e-3)
    assert drift.stable_rank(step) == drift.stable_rank(step)


def test_stable_rank_of_known_matrices():
    assert drift.stable_rank(torch.outer(torch.arange(1.0, 6), torch.ones(9))) == pytest.approx(1)
    assert drift.stable_rank(3 * torch.eye(6)) == pytest.approx(6)


def test_finding_it_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drift.stable_rank(torch.ones(4, 4))
    assert torch.equal(torch.rand(3), expected)
