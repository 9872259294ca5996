"""PEAR's weights in a loss, its controls and normalizations, against plain Python."""

from __future__ import annotations

from dataclasses import astuple, replace

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

LEVELS = ("token", "block", "sequence")
WIDE = {"clip_log_ratio": (-2.0, 3.0), "clip_log_weight": (-4.0, 2.0)}
WEIGHERS = {
    "pear": Pear("token"),
    "centered": Centered("block", discount=0.9, **WIDE),
    "shuffled": Shuffled("sequence", **WIDE, seed=3),
}
NORMALIZATIONS = (NoNormalization(), PerSequence(), PerBatch(), MeanWeightOnly())
some_lengths = st.lists(st.integers(0, 25), min_size=1, max_size=6).filter(any)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "chosen",
    [
        {"discount": 0.999, "block_size": 4, "clip_log_ratio": (-0.08, 0.3)} | {"clip_log_weight": (-10.0, 5.0)},
        {"discount": 0.7, "block_size": 3, **WIDE},
    ],
)
def test_pear_equals_pear_weights(random_tokens, level, chosen):
    tokens = random_tokens(0, [1, 30, 7], spread=1.0)
    inputs = (tokens.logprobs, tokens.sampled_logprobs, tokens.sequence_ids)
    expected = pear_weights(*inputs, level=level, **chosen)
    assert torch.equal(Pear(level, **chosen)(tokens), expected)
    assert expected.std() > 0.01


def test_defaults_are_the_papers(random_tokens):
    tokens = random_tokens(0, [400], spread=1.0)
    paper = {"discount": 0.999, "block_size": 4, "clip_log_ratio": (-0.08, 0.3)}
    explicit = Pear("block", clip_log_weight=(-10.0, 5.0), **paper)
    assert explicit == Pear("block") and torch.equal(explicit(tokens), Pear("block")(tokens))


@pytest.mark.parametrize("level", LEVELS)
def test_centered_subtracts_the_mean_of_each_sequence(random_tokens, level):
    lengths = [1, 30, 0, 7]
    tokens = random_tokens(1, lengths, spread=1.0)
    pear = Pear(level, discount=0.95, **WIDE)
    ratios = (tokens.logprobs.detach() - tokens.sampled_logprobs).double().numpy()
    rows = np.split(ratios, np.cumsum(lengths)[:-1])
    centered = np.concatenate([row - row.mean() for row in rows if len(row)])
    assert abs(centered - ratios).max() > 0.1
    expected = pear(
        replace(
            tokens,
            logprobs=torch.from_numpy(centered),
            sampled_logprobs=torch.zeros(len(centered), dtype=torch.float64),
        )
    )
    torch.testing.assert_close(Centered(*astuple(pear))(tokens).double(), expected, rtol=1e-4, atol=0)


def test_centered_ignores_a_shift_of_a_sequence(random_tokens):
    tokens = random_tokens(2, [12, 40], spread=0.1)
    shift = torch.tensor([-0.25, 0.5])[tokens.sequence_ids]
    shifted = replace(tokens, sampled_logprobs=tokens.sampled_logprobs + shift)
    centered = Centered("token")
    torch.testing.assert_close(centered(shifted), centered(tokens), rtol=1e-4, atol=0)
    assert (Pear("token")(shifted) / Pear("token")(tokens) - 1).abs().max() > 0.5


@settings(max_examples=15, deadline=None)
@given(lengths=some_lengths, seed=st.integers(0, 2**40))
def test_shuffled_permutes_the_weights(random_tokens, lengths, seed):
    tokens = random_tokens(3, lengths)
    pear = Pear("token")
    before = torch.get_rng_state()
    shuffled = Shuffled(*astuple(pear), seed=seed)(tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(shuffled.sort().values, pear(tokens).sort().values)
    assert torch.equal(Shuffled(*astuple(pear), seed=seed)(tokens), shuffled)


def test_shuffled_mixes_sequences_and_depends_on_the_seed(random_tokens):
    """The mean weight of a sequence becomes that of the batch."""
    tokens = random_tokens(4, [500, 500])
    shift = torch.tensor([0.2, -0.2])[tokens.sequence_ids]
    tokens = replace(tokens, sampled_logprobs=tokens.logprobs.detach() + shift)
    pear = Pear("sequence", clip_log_weight=(-1.0, 1.0))
    shuffled = [Shuffled(*astuple(pear), seed=seed)(tokens) for seed in range(3)]
    assert not torch.equal(shuffled[0], shuffled[1]) and not torch.equal(shuffled[1], shuffled[2])
    low, high = pear(tokens)[[0, -1]].tolist()
    for weights in shuffled:
        for row in weights.split([500, 500]):
            assert row.mean().item() == pytest.approx((low + high) / 2, abs=0.1 * (high - low))


@pytest.mark.parametrize("weigher", WEIGHERS.values(), ids=WEIGHERS)
def test_weights_are_detached(random_tokens, weigher):
    tokens = random_tokens(5, [4, 9])
    for normalization in NORMALIZATIONS:
        assert not normalization.apply(weigher(tokens), tokens).requires_grad


@settings(max_examples=15, deadline=None)
@given(lengths=some_lengths, seed=st.integers(0, 999))
def test_per_sequence_makes_every_mean_one(random_tokens, lengths, seed):
    tokens = random_tokens(seed, lengths, spread=2.0)
    weights = Pear("token", **WIDE)(tokens)
    applied = PerSequence().apply(weights, tokens)
    for row, before in zip(applied.split(lengths), weights.split(lengths), strict=True):
        if len(row):
            assert row.mean().item() == pytest.approx(1, rel=1e-5)
            # Ratios within a sequence do not change.
            torch.testing.assert_close(row / row[0], before / before[0], rtol=1e-5, atol=0)
    assert PerSequence().grad_scale(0.3) == 1


def test_per_batch_makes_the_mean_over_micro_batches_one(random_tokens):
    batches = [random_tokens(seed, [9, 30], spread=1.0) for seed in range(3)]
    weights = [Pear("token", **WIDE)(tokens) for tokens in batches]
    mean = float(torch.cat(weights).mean())
    assert abs(mean - 1) > 0.05
    pairs = zip(weights, batches, strict=True)
    applied = torch.cat([PerBatch().apply(w, tokens) for w, tokens in pairs])
    assert float((applied * PerBatch().grad_scale(mean)).mean()) == pytest.approx(1, rel=1e-6)
    assert torch.equal(applied, torch.cat(weights))


def test_mean_weight_only_weights_all_tokens_alike(random_tokens):
    tokens = random_tokens(6, [9, 30])
    weights = Pear("token")(tokens)
    applied = MeanWeightOnly().apply(weights, tokens)
    assert torch.equal(applied, torch.ones(39)) and applied.dtype == weights.dtype
    assert MeanWeightOnly().grad_scale(0.375) == 0.375


def test_no_normalization(random_tokens):
    tokens = random_tokens(7, [5])
    weights = torch.tensor([0.1, 2.0, 0.0, 1.0, 148.0])
    assert torch.equal(NoNormalization().apply(weights, tokens), weights)
    assert NoNormalization().grad_scale(0.375) == 1


@pytest.mark.parametrize("weigher", WEIGHERS.values(), ids=WEIGHERS)
@settings(max_examples=12, deadline=None)
@given(lengths=some_lengths)
def test_sequences_without_tokens_change_nothing(random_tokens, weigher, lengths):
    tokens = random_tokens(8, lengths)
    dense = random_tokens(8, [length for length in lengths if length])
    for normalization in NORMALIZATIONS:
        applied = normalization.apply(weigher(tokens), tokens)
        assert applied.isfinite().all()
        assert torch.equal(applied, normalization.apply(weigher(dense), dense))


@pytest.mark.parametrize("weigher", WEIGHERS.values(), ids=WEIGHERS)
def test_no_tokens(random_tokens, weigher):
    tokens = random_tokens(9, [0, 0])
    for normalization in NORMALIZATIONS:
        assert normalization.apply(weigher(tokens), tokens).shape == (0,)
