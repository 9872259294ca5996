"""Attention over a pack against the slow way: a mask over all pairs of its tokens."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pear_ray.train.attention import attention_by_runs, pack_layout

SCALING = 0.3


def pack_of(lengths):
    return np.repeat(np.arange(len(lengths)), lengths)


def runs_of(lengths):
    return pack_layout(pack_of(lengths), torch.device("cpu"))["runs"]


def slow_attention(query, key, value, sequence_ids_T):
    """[1, heads, tokens, size] -> [1, tokens, heads, size], with every score written out."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * SCALING
    ids = torch.from_numpy(sequence_ids_T)
    seen = (ids[:, None] == ids[None]) & torch.ones(len(ids), len(ids)).tril().bool()
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def states(num_heads, num_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, num_heads, num_tokens, 8, generator=generator, dtype=torch.float64)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_runs_are_neighbors_of_one_length(lengths):
    runs = runs_of(lengths)
    assert [length for number, length in runs for _ in range(number)] == lengths
    assert all(one[1] != other[1] for one, other in pairwise(runs))


@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 6], [1, 1, 1], [2, 7, 2, 1], [2, 2, 5, 5, 5]])
def test_attention_by_runs_is_attention_within_each_sequence(lengths, num_key_heads):
    sequence_ids_T = pack_of(lengths)
    num_tokens = sum(lengths)
    inputs = [states(n, num_tokens, i) for i, n in enumerate([4, num_key_heads, num_key_heads])]
    direction = torch.randn(1, num_tokens, 4, 8, dtype=torch.float64)

    def outcome(attend):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        attended = attend(*leaves)
        (attended * direction).sum().backward()
        return [attended.detach(), *(leaf.grad for leaf in leaves)]

    packed = outcome(lambda q, k, v: attention_by_runs(q, k, v, scaling=SCALING, runs=runs_of(lengths)))
    slow = outcome(lambda q, k, v: slow_attention(q, k, v, sequence_ids_T))
    for ours, theirs in zip(packed, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_window_shorter_than_a_sequence_is_refused():
    query = states(2, 6, 0)
    arguments = {"scaling": SCALING, "runs": ((1, 4), (1, 2))}
    with pytest.raises(ValueError, match=r"sliding_window: expected at least 4 tokens.*got 3"):
        attention_by_runs(query, query, query, sliding_window=3, **arguments)
    attention_by_runs(query, query, query, sliding_window=4, **arguments)
