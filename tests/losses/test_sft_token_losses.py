"""Base losses and their gradients against the papers' formulas in plain Python."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.losses.sft import Dft, IwSft, Kl, Nll, SedSft, TrSft, Unlikelihood, log_complement

# Functions of a log-prob x and of detached values: the same log-prob, the mass of the likeliest tokens and the mean
# log-ratio of the sequence.
FORMULAS = {
    "nll": (Nll(), lambda x, fixed: -x),
    "dft": (Dft(), lambda x, fixed: -math.exp(fixed.x) * x),
    "trsft": (TrSft(), lambda x, fixed: -min(1, math.exp(fixed.x) / 0.1) * x),
    "trsft, wide": (TrSft(alpha=0.6), lambda x, fixed: -min(1, math.exp(fixed.x) / 0.6) * x),
    "sedsft": (SedSft(), lambda x, fixed: -x + (fixed.mass < 0.95) * well(x)),
    "sedsft, weak": (
        SedSft(strength=0.2, top_k=2, top_mass=0.98),
        lambda x, fixed: -x + 0.2 * (fixed.mass < 0.98) * well(x),
    ),
    "iwsft": (IwSft(), lambda x, fixed: -min(math.exp(fixed.ratio), 16) * x),
    "iwsft, bounded": (
        IwSft(temperature=3.0, bounds=(0.9, 1.2)),
        lambda x, fixed: -min(max(math.exp(3 * fixed.ratio), 0.9), 1.2) * x,
    ),
    "unlikelihood": (Unlikelihood(), lambda x, fixed: min(5.0, -math.log(1 - math.exp(x)))),
    "unlikelihood, low": (Unlikelihood(cap=0.5), lambda x, fixed: min(0.5, -math.log(1 - math.exp(x)))),
}


def well(x):
    """Return (p - 1/2)^2 in the form of SED-SFT's authors."""
    return math.exp(x) * (math.exp(x) - 1) + 0.25


def detached_values(tokens):
    columns = [
        column.tolist() for column in (tokens.logprobs, tokens.sampled_logprobs, tokens.top_masses, tokens.sequence_ids)
    ]
    ratios = {}
    for x, sampled, _, owner in zip(*columns, strict=True):
        ratios.setdefault(owner, []).append(x - sampled)
    return [
        SimpleNamespace(x=x, mass=mass, ratio=math.fsum(ratios[owner]) / len(ratios[owner]))
        for x, _, mass, owner in zip(*columns, strict=True)
    ]


def slope(function, x, step=1e-6):
    return (function(x + step) - function(x - step)) / (2 * step)


@pytest.mark.parametrize(("loss", "formula"), FORMULAS.values(), ids=FORMULAS)
def test_values_and_slopes_equal_the_formula(random_tokens, loss, formula):
    tokens = random_tokens(0, [1, 30, 0, 7, 62], spread=0.6)
    losses = loss(tokens)
    assert losses.shape == tokens.logprobs.shape and losses.dtype == torch.float32
    coefficients = torch.linspace(-1, 2, 100)
    (gradient,) = torch.autograd.grad(losses @ coefficients, tokens.logprobs)
    rows = detached_values(tokens)
    values = np.array([formula(row.x, row) for row in rows])
    slopes = np.array([slope(lambda x, row=row: formula(x, row), row.x) for row in rows])
    np.testing.assert_allclose(losses.detach(), values, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, slopes * coefficients.numpy(), rtol=1e-4, atol=1e-7)


def test_random_tokens_lie_on_both_sides_of_every_bound(random_tokens):
    """Otherwise the test above would not cover the bounds."""
    rows = detached_values(random_tokens(0, [1, 30, 0, 7, 62], spread=0.6))
    for values, bounds in [
        ([math.exp(row.x) for row in rows], (0.1, 0.6)),
        ([row.mass for row in rows], (0.95, 0.98)),
        ([math.exp(3 * row.ratio) for row in rows], (0.9, 1.2)),
        ([-math.log(1 - math.exp(row.x)) for row in rows], (0.5, 5.0)),
    ]:
        for bound in bounds:
            assert min(values) < bound < max(values), (bound, min(values), max(values))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-4, 0.999), min_size=1, max_size=20), st.floats(0.01, 1.0))
def test_gradients_with_respect_to_the_probability(random_tokens, probs, alpha):
    """1/p of plain SFT becomes 1 in DFT and 1 / max(p, alpha) in TrSFT."""
    p = torch.tensor(probs, dtype=torch.float64).requires_grad_()
    tokens = replace(random_tokens(0, [len(probs)]), logprobs=p.log())
    slopes = {
        loss: torch.autograd.grad(loss(tokens).sum(), p, retain_graph=True)[0] for loss in (Nll(), Dft(), TrSft(alpha))
    }
    torch.testing.assert_close(slopes[Nll()], -1 / p.detach())
    torch.testing.assert_close(slopes[Dft()], -torch.ones(len(probs)).double())
    torch.testing.assert_close(slopes[TrSft(alpha)], -1 / p.detach().clamp(min=alpha))


def test_sedsft_applies_below_the_bound(random_tokens):
    """A known implementation inverts the mask."""
    tokens = random_tokens(0, [4])
    masses = torch.tensor([0.2, 0.9499, 0.95, 1.0])
    added = SedSft()(replace(tokens, top_masses=masses)) - Nll()(tokens)
    assert (added != 0).tolist() == [True, True, False, False]
    assert (SedSft(top_k=3).top_k, SedSft().top_k, Nll().top_k, Kl(9).top_k) == (3, 10, 0, 0)


def test_iwsft_weighs_all_tokens_of_a_sequence_alike(random_tokens):
    tokens = random_tokens(3, [5, 0, 1, 8], spread=1.0)
    weights = IwSft()(tokens) / Nll()(tokens)
    for row in weights.detach().split([5, 1, 8]):
        torch.testing.assert_close(row, row[:1].expand_as(row))
    far = replace(tokens, sampled_logprobs=tokens.logprobs.detach() - 100)
    torch.testing.assert_close(IwSft()(far), -16 * tokens.logprobs)
    assert IwSft()(replace(tokens, sampled_logprobs=tokens.logprobs.detach() + 200)).eq(0).all()


def random_pair(seed, num_positions, vocabulary, spread=0.5):
    """Return logits of teacher and student, float64, the student's with gradient."""
    rng = np.random.default_rng(seed)
    teacher = torch.from_numpy(rng.standard_normal((num_positions, vocabulary)))
    student = teacher + spread * torch.from_numpy(rng.standard_normal((num_positions, vocabulary)))
    return teacher, student.requires_grad_()


def kl_tokens(random_tokens, teacher, student):
    tokens = random_tokens(0, [len(teacher)])
    return replace(tokens, teacher_logprobs=teacher, logprobs_of_teacher=student)


def top_k_logprobs(k, teacher, student):
    """Return both policies' log-probs of the teacher's k likeliest tokens."""
    stored, ids = teacher.log_softmax(-1).topk(k)
    return stored, student.log_softmax(-1).gather(-1, ids)


def full_kl(teacher, student):
    """Return the KL divergence over the whole vocabulary, in plain Python."""
    return [
        math.fsum(math.exp(b) * (b - t) for b, t in zip(row, other, strict=True))
        for row, other in zip(teacher.log_softmax(-1).tolist(), student.log_softmax(-1).tolist(), strict=True)
    ]


def bucket_kl(teacher, student):
    """Return the KL divergence of one row: stored tokens, and all others as one."""
    stored = [math.exp(b) * (b - t) for b, t in zip(teacher, student, strict=True)]
    rest, own_rest = (1 - math.fsum(map(math.exp, row)) for row in (teacher, student))
    return math.fsum(stored) + rest * (math.log(rest) - math.log(own_rest))


def test_kl_of_the_whole_vocabulary(random_tokens):
    teacher, student = random_pair(0, 9, 12)
    stored, own = top_k_logprobs(12, teacher, student)
    loss = Kl(12)(kl_tokens(random_tokens, stored.float(), own.float()))
    np.testing.assert_allclose(loss.detach(), full_kl(teacher, student), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    expected = student.detach().softmax(-1) - teacher.softmax(-1)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_the_whole_vocabulary_leaves_no_bucket(random_tokens):
    """Even if rounding takes some of the mass away."""
    theirs, own = torch.tensor([[0.49, 0.5]]).log(), torch.tensor([[0.9, 0.05]]).log()
    loss = Kl(2)(kl_tokens(random_tokens, theirs, own))
    assert loss.item() == pytest.approx(0.49 * math.log(0.49 / 0.9) + 0.5 * math.log(10))


@pytest.mark.parametrize("stored", [1, 2, 5, 11])
def test_kl_with_a_bucket(random_tokens, stored):
    theirs, own = (side.detach().float() for side in top_k_logprobs(stored, *random_pair(stored, 9, 12)))
    own.requires_grad_()
    loss = Kl(12)(kl_tokens(random_tokens, theirs, own))
    rows = list(zip(theirs.tolist(), own.tolist(), strict=True))
    np.testing.assert_allclose(loss.detach(), [bucket_kl(*row) for row in rows], rtol=1e-4, atol=2e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), own)
    slopes = [
        [slope(lambda x, b=b, t=t, i=i: bucket_kl(b, [*t[:i], x, *t[i + 1 :]]), t[i]) for i in range(stored)]
        for b, t in rows
    ]
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), spread=st.floats(0, 3))
def test_kl_with_a_bucket_is_a_lower_bound_that_increases_with_stored_tokens(random_tokens, seed, spread):
    # No token below 3e-5: a remainder below 1e-6 counts as 1e-6.
    teacher, student = (side.detach().clamp(-4, 4) for side in random_pair(seed, 3, 12, spread))
    bounds = [Kl(12)(kl_tokens(random_tokens, *top_k_logprobs(k, teacher, student))) for k in range(1, 13)]
    steps = torch.stack(bounds).diff(dim=0)
    # The bucket is the twelfth token: eleven of twelve tokens suffice.
    assert (steps > -1e-9).all() and (bounds[0] > -1e-9).all()
    np.testing.assert_allclose(bounds[-2], bounds[-1], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(bounds[-1], full_kl(teacher, student), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stored", [1, 5, 12])
def test_kl_of_equal_policies_is_zero_with_zero_gradient(random_tokens, stored):
    teacher, _ = random_pair(1, 9, 12)
    student = teacher.float().requires_grad_()
    theirs, own = top_k_logprobs(stored, student.detach(), student)
    loss = Kl(12)(kl_tokens(random_tokens, theirs, own))
    assert not loss.any()
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


# Three stored log-probs whose probabilities sum to 1, up to rounding, and to about 0.55.
MASSES = {
    "certain": [0.0, -40.0, -60.0],
    "even": [math.log(1 / 3)] * 3,
    "above": [math.log(0.5), math.log(0.5), math.log(2e-7)],
    "below": [-1e-7, -30.0, -30.0],
    "none left in float32": [0.0, -1000.0, -1000.0],
    "open": [-1.0, -2.0, -3.0],
}


@pytest.mark.parametrize(("teacher", "student"), list(itertools.product(MASSES, MASSES)))
def test_kl_is_finite_without_remaining_mass(random_tokens, teacher, student):
    own = torch.tensor([MASSES[student]], requires_grad=True)
    loss = Kl(99)(kl_tokens(random_tokens, torch.tensor([MASSES[teacher]]), own))
    (gradient,) = torch.autograd.grad(loss.sum(), own)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert loss.item() > -2e-5
    if teacher == student:
        assert loss.item() == 0


# At the largest a probability counts as 1; at ln 1/2 the formula changes.
COMPLEMENTS = [-1e-6, -1.1e-6, -1e-5, -1e-3, -0.1, -0.693, -0.6931, -math.log(2), -0.6932]
COMPLEMENTS += [-0.7, -1.0, -3.0, -10.0, -16.0, -20.0, -50.0, -80.0, -100.0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_log_complement_is_exact(dtype, tolerance):
    x = torch.tensor(COMPLEMENTS, dtype=dtype).requires_grad_()
    complement = log_complement(x)
    (gradient,) = torch.autograd.grad(complement.sum(), x)
    exact = x.tolist()
    values = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in exact]
    assert complement.dtype == dtype
    np.testing.assert_allclose(complement.detach(), values, rtol=tolerance, atol=1e-40)
    slopes = [-1 / math.expm1(-v) for v in exact]
    np.testing.assert_allclose(gradient, slopes, rtol=tolerance, atol=1e-40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_complement_of_a_certain_token_has_no_gradient(dtype):
    x = torch.tensor([-1e-12, -1e-9, -9e-7, -0.0, 0.0, 1e-7], dtype=dtype).requires_grad_()
    complement = log_complement(x)
    (gradient,) = torch.autograd.grad(complement.sum(), x)
    np.testing.assert_allclose(complement.detach(), [math.log(-math.expm1(-1e-6))] * 6, rtol=1e-6)
    assert not gradient.any()


@settings(max_examples=60, deadline=None)
@given(st.floats(-100, 2**-20, width=32))
def test_log_complement_is_finite_everywhere(value):
    x = torch.tensor([value], requires_grad=True)
    complement = log_complement(x)
    complement.backward()
    assert complement.isfinite() and complement <= 0
    assert x.grad.isfinite() and x.grad <= 0


def test_log_complement_of_several():
    probs = torch.tensor([[0.5, 0.25], [0.1, 1e-9], [0.999, 0.0009]], dtype=torch.float64)
    left = 1 - probs.sum(-1)
    torch.testing.assert_close(log_complement(probs.log().logsumexp(-1)), left.log(), rtol=1e-9, atol=0)
