"""SFT objectives: their formulas, and sums that do not depend on how a batch is cut."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.losses.pear import (
    Centered,
    MeanWeightOnly,
    NoNormalization,
    Pear,
    PerBatch,
    PerSequence,
    Shuffled,
    pear_weights,
)
from pear_ray.losses.sft import Dft, IwSft, Kl, Nll, SedSft, Supervised, TrSft, Unlikelihood, Weighted, histogram

LEVELS = ("token", "block", "sequence")
SOURCES = ("teacher_plain", "teacher_cipher")
CLIPS = {"clip_log_ratio": (-0.5, 0.5), "clip_log_weight": (-2.0, 2.0)}
LOSSES = {"nll": Nll(), "dft": Dft(), "trsft": TrSft(), "sedsft": SedSft(), "iwsft": IwSft(), "kl": Kl(vocab_size=12)}
NORMALIZATIONS = {
    "none": NoNormalization(),
    "per_sequence": PerSequence(),
    "per_batch": PerBatch(),
    "mean_weight": MeanWeightOnly(),
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
    """Return the micro-batch of some of the sequences, renumbered."""
    index = torch.cat([(tokens.sequence_ids == member).nonzero()[:, 0] for member in members])
    values = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    chosen = {name: v[index] for name, v in values.items() if isinstance(v, torch.Tensor)}
    lengths = torch.bincount(tokens.sequence_ids, minlength=len(tokens.origins))[members]
    chosen["sequence_ids"] = torch.repeat_interleave(torch.arange(len(members)), lengths)
    return replace(tokens, **chosen, origins=tuple(tokens.origins[member] for member in members))


def gradients(loss, tokens):
    """Return the gradients of both inputs, zeros if the loss does not use one."""
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
        for one, other in zip(gradients(pear.loss, tokens), gradients(plain.loss, tokens), strict=True):
            assert torch.equal(one, other)
        assert all(torch.equal(pear.metric_sums[name], v) for name, v in plain.metric_sums.items())
        sums = {name: value.numpy() for name, value in pear.metric_sums.items()}
        assert objective.grad_scale(sums, 238) == 1


def test_plain_sft_in_plain_python(random_tokens):
    """Positive coefficients learn, negative ones unlearn, 0 does neither."""
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
    assert sums.metric_sums.keys() == {"nll", "tokens_to_learn", "entropy"}
    assert float(sums.metric_sums["nll"]) == pytest.approx(nll, rel=1e-6)
    assert int(sums.metric_sums["tokens_to_learn"]) == sum(c > 0 for c, _ in pairs)
    assert float(sums.metric_sums["entropy"]) == pytest.approx(sum(tokens.entropies.tolist()), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_negative_coefficients_replace_the_loss_by_unlikelihood(random_tokens, loss):
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
    grad, teacher_grad = gradients(sums.loss, wrong)
    torch.testing.assert_close(grad, gradients(expected, wrong)[0])
    # Whatever the base loss: a lower loss makes no wrong token likelier.
    assert (grad >= 0).all() and grad.any() and not teacher_grad.any()
    assert sums.metric_sums["nll"] == sums.metric_sums["tokens_to_learn"] == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_pear_is_the_loss_times_detached_weights(random_tokens, loss, level):
    tokens = random_tokens(1, [9, 40, 3])
    weights = pear_weights(tokens.logprobs, tokens.sampled_logprobs, tokens.sequence_ids, level=level, discount=0.99)
    assert weights.std() > 0.01
    sums = Weighted(loss, weigh=Pear(level, 0.99))(tokens)
    wrong = tokens.coefficients < 0
    losses = torch.where(wrong, Unlikelihood()(tokens), loss(tokens))
    expected = (weights * tokens.coefficients.abs() * losses).sum()
    torch.testing.assert_close(sums.loss, expected)
    for one, other in zip(gradients(sums.loss, tokens), gradients(expected, tokens), strict=True):
        torch.testing.assert_close(one, other)
    assert float(sums.metric_sums["weight"]) == pytest.approx(float(weights.double().sum()), rel=1e-6)


@pytest.mark.parametrize("name", NORMALIZATIONS)
@pytest.mark.parametrize("weigh", [Pear("block"), Shuffled("token", seed=5)])
def test_loss_uses_normalized_weights_and_metrics_raw_ones(random_tokens, name, weigh):
    tokens = random_tokens(2, [9, 0, 40], spread=0.5, coefficients=(1.0, 2.0))
    raw = weigh(tokens)
    rows = raw.split([9, 40])
    applied = {
        "none": raw,
        "per_sequence": torch.cat([row / row.mean() for row in rows]),
        "per_batch": raw,
        "mean_weight": torch.ones(49),
    }[name]
    sums = Weighted(weigh=weigh, normalization=NORMALIZATIONS[name])(tokens)
    sums.loss.backward()
    torch.testing.assert_close(tokens.logprobs.grad, -applied * tokens.coefficients)
    assert float(sums.metric_sums["weight"]) == pytest.approx(float(raw.double().sum()))
    assert float(sums.metric_sums["weight_squared"]) == pytest.approx(float(raw.double() @ raw.double()))


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_grad_scale_normalizes_over_micro_batches(random_tokens, name):
    """As if the weights of the whole step were normalized at once."""
    objective = Weighted(weigh=Pear("token"), normalization=NORMALIZATIONS[name])
    tokens = random_tokens(3, [9, 1, 40, 22], coefficients=(1.0,))
    raw = Pear("token")(tokens)
    mean = float(raw.double().mean())
    assert abs(mean - 1) > 0.05
    pieces = [objective(part(tokens, members)) for members in ([2], [0, 3], [1])]
    pieces.append(objective(random_tokens(0, [0])))
    names = pieces[0].metric_sums
    sums = {name: sum(p.metric_sums[name] for p in pieces).numpy() for name in names}
    expected = {"per_batch": 1 / mean, "mean_weight": mean}.get(name, 1.0)
    scale = objective.grad_scale(sums, 72)
    assert isinstance(scale, float) and scale == pytest.approx(expected, rel=1e-6)
    if name in ("per_batch", "mean_weight"):
        gradient = scale * gradients(sum(p.loss for p in pieces), tokens)[0]
        mean_size = {"per_batch": 1.0, "mean_weight": mean}[name]
        assert float(-gradient.mean()) == pytest.approx(mean_size, rel=1e-5)


def test_plain_sft_has_grad_scale_one(random_tokens):
    tokens = random_tokens(3, [9])
    for objective in (Supervised(), Supervised(IwSft())):
        sums = {name: value.numpy() for name, value in objective(tokens).metric_sums.items()}
        assert objective.grad_scale(sums, 9) == 1


def test_top_k_is_that_of_the_loss():
    assert Supervised().top_k == 0
    assert Supervised(SedSft(top_k=7)).top_k == 7
    assert Weighted(SedSft(top_k=7), weigh=Pear("token")).top_k == 7


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_sums_do_not_depend_on_the_split(random_tokens, objective, data):
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=7))
    batch_of = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    tokens = random_tokens(data.draw(st.integers(0, 999)), lengths)
    whole = objective(tokens)
    pieces = [
        objective(part(tokens, [s for s, b in enumerate(batch_of) if b == batch])) for batch in sorted(set(batch_of))
    ]
    pieces.append(objective(random_tokens(0, [0])))
    loss = sum(piece.loss for piece in pieces)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-4, atol=1e-4)
    for one, other in zip(gradients(loss, tokens), gradients(whole.loss, tokens), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    for name, value in whole.metric_sums.items():
        added = sum(piece.metric_sums[name] for piece in pieces)
        torch.testing.assert_close(added, value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_metric_sums_are_detached_and_an_empty_batch_adds_nothing(random_tokens, objective):
    metrics = objective(random_tokens(2, [4, 5])).metric_sums
    assert not any(value.requires_grad for value in metrics.values())
    empty = random_tokens(0, [0])
    sums = objective(empty)
    assert sums.metric_sums.keys() == metrics.keys()
    assert all(gradient.shape[0] == 0 for gradient in gradients(sums.loss, empty))
    assert sums.loss.item() == 0
    assert all(not value.any() for value in sums.metric_sums.values())


def test_first_weights_are_summed_by_source(random_tokens):
    tokens = random_tokens(5, [6, 7, 8, 9])
    weights = torch.arange(30, dtype=torch.float64) + 1
    sums = Weighted(weigh=Pear("token"), sources=SOURCES).weight_sums(weights, tokens)
    assert float(sums["first_weight/teacher_plain"]) == 1 + 22 and int(sums["sequences/teacher_plain"]) == 2
    assert float(sums["first_weight/teacher_cipher"]) == 7 and int(sums["sequences/teacher_cipher"]) == 1
    clipped = (tokens.log_ratios() <= -0.08).tolist()
    of_teacher = {"teacher_plain": clipped[:6] + clipped[21:], "teacher_cipher": clipped[6:13]}
    for source, own in of_teacher.items():
        assert int(sums[f"tokens/{source}"]) == len(own) and int(sums[f"clipped_low/{source}"]) == sum(own)


def test_histogram_equals_bincount():
    bins = torch.tensor([0, 3, 3, 1, 4])
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    assert histogram(bins, 6).tolist() == np.bincount(bins, minlength=6).tolist()
    assert histogram(bins, 6, weights).tolist() == [0.5, 4.0, 0.0, 3.0, 8.0, 0.0]
