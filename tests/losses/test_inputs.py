"""Sums, means and positions of tokens by sequence, including sequences without tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def test_sums_and_means_equal_a_loop(random_tokens):
    lengths = [3, 0, 1, 20, 0]
    tokens = random_tokens(0, lengths)
    values = torch.arange(24.0) - 5
    rows = [row.tolist() for row in values.split(lengths)]
    assert len(tokens.origins) == 5
    assert tokens.lengths().tolist() == lengths
    assert tokens.sums_by_sequence(values).tolist() == [sum(row) for row in rows]
    means = tokens.means_by_sequence(values).tolist()
    assert means == [sum(row) / len(row) if row else 0.0 for row in rows]


def test_sums_have_a_gradient(random_tokens):
    tokens = random_tokens(0, [2, 3])
    sums = tokens.sums_by_sequence(tokens.logprobs)
    (gradient,) = torch.autograd.grad(sums @ torch.tensor([2.0, -1.0]), tokens.logprobs)
    assert gradient.tolist() == [2, 2, -1, -1, -1]


def test_relative_positions_by_hand(random_tokens):
    tokens = random_tokens(0, [4, 1, 0, 0, 2, 0])
    relative, is_first = tokens.relative_positions()
    assert relative.tolist() == [0, 0.25, 0.5, 0.75, 0, 0, 0.5]
    assert is_first.tolist() == [True, False, False, False, True, True, False]


def test_no_tokens_at_all(random_tokens):
    tokens = random_tokens(0, [0])
    relative, is_first = tokens.relative_positions()
    assert relative.shape == is_first.shape == (0,) and is_first.dtype == torch.bool
    assert tokens.means_by_sequence(torch.empty(0)).tolist() == [0.0]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=6).filter(any))
def test_sequences_without_tokens_change_nothing(random_tokens, lengths):
    tokens = random_tokens(1, lengths)
    dense = replace(
        tokens,
        sequence_ids=tokens.sequence_ids.unique(return_inverse=True)[1],
        origins=tuple(o for o, length in zip(tokens.origins, lengths, strict=True) if length),
    )
    for one, other in zip(tokens.relative_positions(), dense.relative_positions(), strict=True):
        assert torch.equal(one, other)
    means = tokens.means_by_sequence(tokens.entropies)
    has_tokens = torch.tensor([length > 0 for length in lengths])
    assert torch.equal(means[has_tokens], dense.means_by_sequence(tokens.entropies))
    assert not means[~has_tokens].any()
