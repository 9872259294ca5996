"""Objectives: sums that do not depend on how a batch is cut, and the maths of each."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.losses.pear import pear_weights
from pear_ray.losses.sft import (
    Supervised,
    Weighted,
    histogram,
)
from pear_ray.losses.token_losses import (
    Dft,
    IwSft,
    Kl,
    Nll,
    SedSft,
    TrSft,
    Unlikelihood,
)
from pear_ray.losses.weighting import (
    Centered,
    MeanWeightOnly,
    NoNormalization,
    Pear,
    PerBatch,
    PerSequence,
    Shuffled,
)

LEVELS = ("token", "block", "sequence")
SOURCES = ("tutor", "coder")
CLIPS = {"clip_log_ratio": (-0.5, 0.5), "clip_log_weight": (-2.0, 2.0)}
LOSSES = {
    "nll": Nll(),
    "dft": Dft(),
    "trsft": TrSft(),
    "sedsft": SedSft(),
    "iwsft": IwSft(),
    "kl": Kl(vocab_size=12),
}
NORMALIZATIONS = {
    "as they are": NoNormalization(),
    "per sequence": PerSequence(),
    "per batch": PerBatch(),
    "only the mean": MeanWeightOnly(),
}
OBJECTIVES = {
    **{f"plain {name}": Supervised(loss) for name, loss in LOSSES.items()},
    **{f"weighted {n}": Weighted(loss, weigh=Pear("token")) for n, loss in LOSSES.items()},
    **{
        name: Weighted(weigh=Pear("token"), normalization=chosen, sources=SOURCES)
        for name, chosen in NORMALIZATIONS.items()
    },
    "block": Weighted(weigh=Pear("block", 0.9, 3, **CLIPS), sources=SOURCES),
    "sequence": Weighted(weigh=Pear("sequence", 1.0), sources=SOURCES),
    "centered": Weighted(weigh=Centered("token"), sources=SOURCES),
}


def part(tokens, members):
    """The micro-batch of some of the sequences, numbered afresh."""
    where = torch.cat([(tokens.sequence_ids == member).nonzero()[:, 0] for member in members])
    found = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    chosen = {name: v[where] for name, v in found.items() if isinstance(v, torch.Tensor)}
    lengths = torch.bincount(tokens.sequence_ids, minlength=tokens.num_sequences)[members]
    chosen["sequence_ids"] = torch.repeat_interleave(torch.arange(len(members)), lengths)
    return replace(tokens, **chosen, origins=tuple(tokens.origins[member] for member in members))


def gradients(loss, tokens):
    """Of both tensors that have one, zeros where the loss does not look at it."""
    inputs = (tokens.logprobs, tokens.logprobs_of_teacher)
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS.values(), ids=NORMALIZATIONS)
def test_equal_policies_make_pear_plain_sft_bit_for_bit(random_tokens, loss, normalization):
    for seed, level in enumerate(LEVELS * 2):
        tokens = random_tokens(seed, [1, 30, 0, 7, 200], spread=0.0)
        plain = Supervised(loss)(tokens)
        objective = Weighted(loss, weigh=Pear(level, 1.0), normalization=normalization)
        pear = objective(tokens)
        assert torch.equal(pear.loss, plain.loss) and plain.loss != 0
        for one, other in zip(
            gradients(pear.loss, tokens), gradients(plain.loss, tokens), strict=True
        ):
            assert torch.equal(one, other)
        assert all(torch.equal(pear.facts[name], fact) for name, fact in plain.facts.items())
        assert objective.factor({n: f.numpy() for n, f in pear.facts.items()}, 238) == 1


def test_plain_sft_by_hand(random_tokens):
    """What is right is learned, what is wrong is pushed down, and a coefficient of 0 is neither."""
    tokens = random_tokens(0, [20, 3, 7])
    sums = Supervised()(tokens)
    loss, nll, slopes = 0.0, 0.0, []
    pairs = list(zip(tokens.coefficients.tolist(), tokens.logprobs.tolist(), strict=True))
    for coefficient, logprob in pairs:
        p = math.exp(logprob)
        if coefficient < 0:
            loss += abs(coefficient) * min(5.0, -math.log(1 - p))
            slopes.append(abs(coefficient) * p / (1 - p) if -math.log(1 - p) < 5 else 0.0)
        else:
            loss -= coefficient * logprob
            nll -= logprob if coefficient > 0 else 0
            slopes.append(-coefficient)
    assert {coefficient for coefficient, _ in pairs} == {1.0, -0.5, 0.0, 2.0}
    assert sums.loss.item() == pytest.approx(loss, rel=1e-6)
    sums.loss.backward()
    torch.testing.assert_close(tokens.logprobs.grad, torch.tensor(slopes), rtol=1e-5, atol=0)
    assert sums.facts.keys() == {"nll", "tokens_to_learn", "entropy"}
    assert float(sums.facts["nll"]) == pytest.approx(nll, rel=1e-6)
    assert int(sums.facts["tokens_to_learn"]) == sum(c > 0 for c, _ in pairs)
    assert float(sums.facts["entropy"]) == pytest.approx(sum(tokens.entropies.tolist()), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_right_tokens_have_the_loss_and_wrong_ones_unlikelihood(random_tokens, loss):
    right = random_tokens(1, [9, 40], coefficients=(0.0, 1.0, 2.5))
    sums = Supervised(loss)(right)
    expected = (right.coefficients * loss(right)).sum()
    torch.testing.assert_close(sums.loss, expected)
    for one, other in zip(gradients(sums.loss, right), gradients(expected, right), strict=True):
        torch.testing.assert_close(one, other)
    wrong = random_tokens(1, [9, 40], coefficients=(0.0, -0.1, -2.5))
    sums = Supervised(loss)(wrong)
    expected = (-wrong.coefficients * Unlikelihood()(wrong)).sum()
    torch.testing.assert_close(sums.loss, expected)
    on_logprobs, on_teacher = gradients(sums.loss, wrong)
    torch.testing.assert_close(on_logprobs, gradients(expected, wrong)[0])
    # Whatever the loss would do with them: a lower loss makes no wrong token likelier.
    assert (on_logprobs >= 0).all() and on_logprobs.any() and not on_teacher.any()
    assert sums.facts["nll"] == sums.facts["tokens_to_learn"] == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_pear_is_the_loss_times_detached_weights(random_tokens, loss, level):
    tokens = random_tokens(1, [9, 40, 3])
    weights = pear_weights(
        tokens.logprobs, tokens.sampled_logprobs, tokens.sequence_ids, level=level, discount=0.99
    )
    assert weights.std() > 0.01
    sums = Weighted(loss, weigh=Pear(level, 0.99))(tokens)
    wrong = tokens.coefficients < 0
    losses = torch.where(wrong, Unlikelihood()(tokens), loss(tokens))
    expected = (weights * tokens.coefficients.abs() * losses).sum()
    torch.testing.assert_close(sums.loss, expected)
    for one, other in zip(gradients(sums.loss, tokens), gradients(expected, tokens), strict=True):
        torch.testing.assert_close(one, other)
    assert float(sums.facts["weight"]) == pytest.approx(float(weights.double().sum()), rel=1e-6)


@pytest.mark.parametrize("name", NORMALIZATIONS)
@pytest.mark.parametrize("weigh", [Pear("block"), Shuffled("token", seed=5)])
def test_normalized_weights_multiply_and_raw_ones_are_reported(random_tokens, name, weigh):
    tokens = random_tokens(2, [9, 0, 40], spread=0.5, coefficients=(1.0, 2.0))
    raw = weigh(tokens)
    rows = raw.split([9, 40])
    applied = {
        "as they are": raw,
        "per sequence": torch.cat([row / row.mean() for row in rows]),
        "per batch": raw,
        "only the mean": torch.ones(49),
    }[name]
    sums = Weighted(weigh=weigh, normalization=NORMALIZATIONS[name])(tokens)
    sums.loss.backward()
    torch.testing.assert_close(tokens.logprobs.grad, -applied * tokens.coefficients)
    assert float(sums.facts["weight"]) == pytest.approx(float(raw.double().sum()))
    assert float(sums.facts["weight_squared"]) == pytest.approx(float(raw.double() @ raw.double()))


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_factor_makes_whole_steps_comparable(random_tokens, name):
    """Over micro-batches it is as if the weights had been normalized where all are known."""
    objective = Weighted(weigh=Pear("token"), normalization=NORMALIZATIONS[name])
    tokens = random_tokens(3, [9, 1, 40, 22], coefficients=(1.0,))
    raw = Pear("token")(tokens)
    mean = float(raw.double().mean())
    assert abs(mean - 1) > 0.05
    pieces = [objective(part(tokens, members)) for members in ([2], [0, 3], [1])]
    pieces.append(objective(random_tokens(0, [0])))
    facts = {key: sum(p.facts[key] for p in pieces).numpy() for key in pieces[0].facts}
    expected = {"per batch": 1 / mean, "only the mean": mean}.get(name, 1.0)
    factor = objective.factor(facts, 72)
    assert isinstance(factor, float) and factor == pytest.approx(expected, rel=1e-6)
    if name in ("per batch", "only the mean"):
        gradient = factor * gradients(sum(p.loss for p in pieces), tokens)[0]
        mean_size = {"per batch": 1.0, "only the mean": mean}[name]
        assert float(-gradient.mean()) == pytest.approx(mean_size, rel=1e-5)


def test_other_objectives_take_the_gradient_as_it_is(random_tokens):
    tokens = random_tokens(3, [9])
    for objective in (Supervised(), Supervised(IwSft())):
        facts = {name: fact.numpy() for name, fact in objective(tokens).facts.items()}
        assert objective.factor(facts, 9) == 1


def test_top_k_is_that_of_the_loss():
    assert Supervised().top_k == 0
    assert Supervised(SedSft(top_k=7)).top_k == 7
    assert Weighted(SedSft(top_k=7), weigh=Pear("token")).top_k == 7


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_sums_do_not_depend_on_the_split(random_tokens, objective, data):
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=7))
    batch_of = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    tokens = random_tokens(data.draw(st.integers(0, 999)), lengths)
    whole = objective(tokens)
    pieces = [
        objective(part(tokens, [s for s, b in enumerate(batch_of) if b == batch]))
        for batch in sorted(set(batch_of))
    ]
    pieces.append(objective(random_tokens(0, [0])))
    loss = sum(piece.loss for piece in pieces)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-4, atol=1e-4)
    for one, other in zip(gradients(loss, tokens), gradients(whole.loss, tokens), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    for name, fact in whole.facts.items():
        added = sum(piece.facts[name] for piece in pieces)
        torch.testing.assert_close(added, fact, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_facts_carry_no_gradient_and_the_empty_batch_adds_nothing(random_tokens, objective):
    facts = objective(random_tokens(2, [4, 5])).facts
    assert not any(fact.requires_grad for fact in facts.values())
    nothing = random_tokens(0, [0])
    sums = objective(nothing)
    assert sums.facts.keys() == facts.keys()
    assert all(gradient.shape[0] == 0 for gradient in gradients(sums.loss, nothing))
    assert sums.loss.item() == 0
    assert all(not fact.any() for fact in sums.facts.values())


def test_first_weight_of_a_source_is_that_of_its_first_tokens(random_tokens):
    tokens = random_tokens(5, [6, 7, 8, 9])
    weights = torch.arange(30, dtype=torch.float64) + 1
    facts = Weighted(weigh=Pear("token"), sources=SOURCES).facts(weights, tokens)
    assert float(facts["first_weight/tutor"]) == 1 + 22 and int(facts["sequences/tutor"]) == 2
    assert float(facts["first_weight/coder"]) == 7 and int(facts["sequences/coder"]) == 1


def test_histogram_equals_bincount():
    bins = torch.tensor([0, 3, 3, 1, 4])
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    assert histogram(bins, 6).tolist() == np.bincount(bins, minlength=6).tolist()
    assert histogram(bins, 6, weights).tolist() == [0.5, 4.0, 0.0, 3.0, 8.0, 0.0]
