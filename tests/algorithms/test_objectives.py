"""Objectives: sums that do not depend on how a batch is cut, and the maths of each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.algorithms.objectives import (
    ClippedPolicyGradient,
    Nll,
    PearNll,
    Tokens,
    histogram,
    relative_positions,
)
from pear_ray.algorithms.ratios import pear_weights

SOURCES = ("tutor", "coder")
PAPER = ((-0.08, 0.3), (-10.0, 5.0))


def random_tokens(seed, lengths, spread=0.2):
    rng = np.random.default_rng(seed)
    num_tokens = int(np.sum(lengths))
    logprobs = torch.from_numpy(-rng.exponential(1.0, num_tokens)).float()
    return Tokens(
        logprobs=logprobs.requires_grad_(),
        entropies=torch.from_numpy(rng.uniform(0, 3, num_tokens)).float(),
        sampled_logprobs=(
            logprobs.detach() + spread * torch.from_numpy(rng.standard_normal(num_tokens)).float()
        ),
        coefficients=torch.from_numpy(rng.choice([1.0, -0.5, 0.0, 2.0], num_tokens)).float(),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        origins=tuple(("tutor", "coder", "elsewhere")[i % 3] for i in range(len(lengths))),
    )


def part(tokens, members):
    """The micro-batch of some of the sequences, numbered afresh."""
    where = torch.cat([(tokens.sequence_ids == member).nonzero()[:, 0] for member in members])
    lengths = torch.bincount(tokens.sequence_ids)[torch.tensor(members)]
    return Tokens(
        logprobs=tokens.logprobs[where],
        entropies=tokens.entropies[where],
        sampled_logprobs=tokens.sampled_logprobs[where],
        coefficients=tokens.coefficients[where],
        sequence_ids=torch.repeat_interleave(torch.arange(len(members)), lengths),
        origins=tuple(tokens.origins[member] for member in members),
    )


def nothing():
    """A micro-batch of fillers alone."""
    empty = torch.empty(0)
    return Tokens(empty.clone().requires_grad_(), empty, empty, empty, empty.long(), ("",))


OBJECTIVES = {
    "nll": Nll(),
    "pear token": PearNll("token", 0.999, 4, *PAPER, SOURCES),
    "pear block": PearNll("block", 0.9, 3, (-0.5, 0.5), (-2.0, 2.0), SOURCES),
    "pear sequence": PearNll("sequence", 1.0, 4, *PAPER, SOURCES),
    "policy gradient": ClippedPolicyGradient(0.2, 0.28),
}


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_equal_policies_make_pear_plain_sft_bit_for_bit(level):
    for seed in range(20):
        tokens = random_tokens(seed, [1, 30, 7, 200], spread=0.0)
        plain = Nll()(tokens)
        (plain_gradient,) = torch.autograd.grad(plain.loss, tokens.logprobs)
        pear = PearNll(level, 1.0, 4, *PAPER, SOURCES)(tokens)
        (pear_gradient,) = torch.autograd.grad(pear.loss, tokens.logprobs)
        assert torch.equal(pear.loss, plain.loss)
        assert torch.equal(pear_gradient, plain_gradient)
        assert all(torch.equal(pear.facts[name], fact) for name, fact in plain.facts.items())


def test_nll_by_hand():
    tokens = random_tokens(0, [2, 3])
    sums = Nll()(tokens)
    pairs = zip(tokens.coefficients.tolist(), tokens.logprobs.tolist(), strict=True)
    assert sums.loss.item() == pytest.approx(-sum(c * p for c, p in pairs), rel=1e-6)
    assert float(sums.facts["nll"]) == pytest.approx(-sum(tokens.logprobs.tolist()), rel=1e-6)
    sums.loss.backward()
    assert torch.equal(tokens.logprobs.grad, -tokens.coefficients)


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_pear_is_nll_times_detached_weights(level):
    tokens = random_tokens(1, [9, 40, 3])
    weights = pear_weights(
        tokens.logprobs, tokens.sampled_logprobs, tokens.sequence_ids, level=level, discount=0.99
    )
    assert weights.std() > 0.01
    sums = PearNll(level, 0.99, 4, *PAPER, SOURCES)(tokens)
    expected = -(weights.double() * tokens.coefficients * tokens.logprobs.detach()).sum()
    assert sums.loss.item() == pytest.approx(float(expected), rel=1e-5)
    sums.loss.backward()
    torch.testing.assert_close(tokens.logprobs.grad, -weights * tokens.coefficients)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_sums_do_not_depend_on_the_split(objective, data):
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=7))
    batch_of = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    tokens = random_tokens(data.draw(st.integers(0, 999)), lengths)
    whole = objective(tokens)
    (whole_gradient,) = torch.autograd.grad(whole.loss, tokens.logprobs)
    pieces = [
        objective(part(tokens, [s for s, b in enumerate(batch_of) if b == batch]))
        for batch in sorted(set(batch_of))
    ]
    pieces.append(objective(nothing()))
    loss = sum(piece.loss for piece in pieces)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(loss, tokens.logprobs)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-6, atol=0)
    for name, fact in whole.facts.items():
        added = sum(piece.facts[name] for piece in pieces)
        torch.testing.assert_close(added, fact, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_facts_carry_no_gradient_and_the_empty_batch_adds_nothing(objective):
    assert not any(f.requires_grad for f in objective(random_tokens(2, [4, 5])).facts.values())
    sums = objective(nothing())
    sums.loss.backward()
    assert sums.loss.item() == 0
    assert all(not fact.any() for fact in sums.facts.values())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(-5, 0, width=32),
            st.floats(-5, 0, width=32),
            st.sampled_from([1.0, -1.0, 0.0, 0.37, -2.5]),
        ),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([(0.2, 0.28), (0.2, 0.2), (0.5, 3.0)]),
)
def test_policy_gradient_token_by_token(rows, clips):
    low, high = clips
    loss, gradient, clipped = 0.0, [], 0
    for logprob, sampled, advantage in rows:
        ratio = math.exp(logprob - sampled)
        held = ratio > 1 + high if advantage > 0 else ratio < 1 - low
        bound = 1 + high if advantage > 0 else 1 - low
        loss -= advantage * (bound if held else ratio)
        gradient.append(0.0 if held else -advantage * ratio)
        clipped += held and advantage != 0
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    logprobs = columns[0].requires_grad_()
    tokens = Tokens(
        logprobs, torch.zeros(len(rows)), *columns[1:], torch.zeros(len(rows)).long(), ("p",)
    )
    sums = ClippedPolicyGradient(low, high)(tokens)
    sums.loss.backward()
    scale = sum(abs(g) for g in gradient) + abs(loss) + 1
    assert sums.loss.item() == pytest.approx(loss, abs=1e-5 * scale)
    torch.testing.assert_close(logprobs.grad, torch.tensor(gradient), rtol=1e-5, atol=1e-6)
    assert int(sums.facts["clipped"]) == clipped


def test_on_policy_gradient_is_reinforce_and_facts_say_so():
    tokens = random_tokens(3, [10, 20], spread=0.0)
    sums = ClippedPolicyGradient(0.2, 0.28)(tokens)
    sums.loss.backward()
    assert torch.equal(tokens.logprobs.grad, -tokens.coefficients)
    facts = {name: float(fact) for name, fact in sums.facts.items()}
    assert facts["ratio"] == facts["ratio_squared"] == 30
    assert facts["clipped"] == facts["mismatch"] == facts["mismatch_kl"] == 0


def test_mismatch_facts_equal_numpy():
    tokens = random_tokens(4, [50, 60])
    facts = ClippedPolicyGradient(0.2, 0.28)(tokens).facts
    gap = (tokens.logprobs.detach() - tokens.sampled_logprobs).double().numpy()
    expected = {
        "ratio": np.exp(gap).sum(),
        "ratio_squared": np.exp(2 * gap).sum(),
        "mismatch": np.abs(gap).sum(),
        "mismatch_kl": (np.exp(gap) - 1 - gap).sum(),
    }
    for name, value in expected.items():
        assert float(facts[name]) == pytest.approx(value, rel=1e-5), name


def test_first_weight_of_a_source_is_that_of_its_first_tokens():
    tokens = random_tokens(5, [6, 7, 8, 9])
    weights = torch.arange(30, dtype=torch.float64) + 1
    facts = PearNll("token", 0.999, 4, *PAPER, SOURCES).facts(weights, tokens)
    assert float(facts["first_weight/tutor"]) == 1 + 22 and int(facts["sequences/tutor"]) == 2
    assert float(facts["first_weight/coder"]) == 7 and int(facts["sequences/coder"]) == 1


def test_relative_positions_by_hand():
    relative, is_first = relative_positions(torch.tensor([0, 0, 0, 0, 1, 2, 2]))
    assert relative.tolist() == [0, 0.25, 0.5, 0.75, 0, 0, 0.5]
    assert is_first.tolist() == [True, False, False, False, True, True, False]


def test_histogram_equals_bincount():
    bins = torch.tensor([0, 3, 3, 1, 4])
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    assert histogram(bins, 6).tolist() == np.bincount(bins, minlength=6).tolist()
    assert histogram(bins, 6, weights).tolist() == [0.5, 4.0, 0.0, 3.0, 8.0, 0.0]
