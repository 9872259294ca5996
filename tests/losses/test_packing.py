"""Packing: every sequence once, none too long, and balanced ranks."""

from __future__ import annotations

from dataclasses import fields
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.losses.packing import balanced_bins, pack
from pear_ray.records import TrainingSequence

ARRAYS = {
    "token_ids": "token_ids_T",
    "trainable": "trainable_T",
    "sampled_logprobs": "sampled_logprobs_T",
    "coefficients": "coefficients_T",
    "reference_logprobs": "reference_logprobs_T",
}


def sequence(number, num_prompt, num_response, trainable=True):
    """Return a sequence whose entries identify it."""
    rng = np.random.default_rng(number)
    return TrainingSequence.of(
        1000 * number + np.arange(num_prompt),
        1000 * number + 500 + np.arange(num_response),
        -rng.exponential(1.0, num_response),
        coefficient=number + 0.5,
        origin=f"source-{number}",
        response_trainable=np.full(num_response, trainable),
        reference_logprobs=-rng.exponential(1.0, num_response),
    )


# Some sequences have no trainable token, like masked truncated completions, but not all.
shapes = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 20), st.sampled_from([True, True, False])), min_size=1, max_size=40
).filter(lambda drawn: any(trainable for *_, trainable in drawn))


@st.composite
def packings(draw):
    sequences = [sequence(n, *shape) for n, shape in enumerate(draw(shapes))]
    longest = max(len(s.token_ids) for s in sequences)
    return sequences, draw(st.integers(1, 6)), longest + draw(st.integers(0, 60))


def unpack(batch):
    """Yield the sequences of a micro-batch as they were before packing."""
    for number, origin in enumerate(batch.origins):
        mask = batch.sequence_ids_T == number
        yield TrainingSequence(**{own: getattr(batch, packed)[mask] for own, packed in ARRAYS.items()}, origin=origin)


def same(one, other):
    return one.origin == other.origin and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        and getattr(one, name).dtype == getattr(other, name).dtype
        for name in ARRAYS
    )


@settings(max_examples=60, deadline=None)
@given(packings())
def test_every_sequence_is_packed_once_and_whole(packing):
    sequences, num_ranks, capacity = packing
    packed = {}
    for rank in pack(sequences, num_ranks, capacity):
        for batch in rank:
            for piece in unpack(batch):
                if piece.origin:
                    assert piece.origin not in packed
                    packed[piece.origin] = piece
    assert packed.keys() == {s.origin for s in sequences}
    assert all(same(packed[s.origin], s) for s in sequences)


@settings(max_examples=60, deadline=None)
@given(packings())
def test_ranks_have_the_same_number_of_batches_within_capacity(packing):
    sequences, num_ranks, capacity = packing
    ranks = pack(sequences, num_ranks, capacity)
    assert len(ranks) == num_ranks
    assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) >= 1
    for batch in (batch for rank in ranks for batch in rank):
        assert 1 <= len(batch.token_ids_T) <= capacity
        arrays = [getattr(batch, f.name) for f in fields(batch) if f.name.endswith("_T")]
        assert all(a.shape == batch.token_ids_T.shape for a in arrays if a is not None)


@settings(max_examples=60, deadline=None)
@given(packings())
def test_positions_restart_and_sequence_ids_increase(packing):
    sequences, num_ranks, capacity = packing
    for batch in (batch for rank in pack(sequences, num_ranks, capacity) for batch in rank):
        lengths = np.bincount(batch.sequence_ids_T)
        assert len(lengths) == len(batch.origins) and (np.diff(batch.sequence_ids_T) >= 0).all()
        expected = np.concatenate([np.arange(length) for length in lengths])
        assert np.array_equal(batch.position_ids_T, expected)


@settings(max_examples=60, deadline=None)
@given(packings())
def test_fillers_are_not_trainable_and_not_counted(packing):
    sequences, num_ranks, capacity = packing
    batches = [batch for rank in pack(sequences, num_ranks, capacity) for batch in rank]
    fillers = [batch for batch in batches if batch.origins == ("",)]
    assert len(fillers) == max(0, len(batches) - len(sequences))
    for filler in fillers:
        assert not filler.trainable_T.any()
        assert not filler.coefficients_T.any() and not filler.sampled_logprobs_T.any()
    counts = {(b.num_trainable_tokens_global, b.num_sequences_global) for b in batches}
    trainable = [int(s.trainable.sum()) for s in sequences if s.trainable.any()]
    assert counts == {(sum(trainable), len(trainable))}
    assert sum(int(b.trainable_T.sum()) for b in batches) == counts.pop()[0]


@settings(max_examples=30, deadline=None)
@given(packings())
def test_packing_is_deterministic(packing):
    sequences, num_ranks, capacity = packing
    one, other = (pack(list(sequences), num_ranks, capacity) for _ in range(2))
    for mine, theirs in zip(chain(*one), chain(*other), strict=True):
        assert mine.origins == theirs.origins
        assert np.array_equal(mine.token_ids_T, theirs.token_ids_T)


def test_packing_does_not_modify_sequences():
    sequences = [sequence(n, 2, 3) for n in range(3)]
    pack(sequences, 4, 100)
    assert all(same(s, sequence(n, 2, 3)) for n, s in enumerate(sequences))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 100), st.integers(1, 5))
def test_bins_hold_all_sequences_in_few_rounds(lengths, capacity, num_ranks):
    lengths = np.array(lengths)
    bins = balanced_bins(lengths, lengths.astype(float), num_ranks, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    loads = np.array([lengths[members].sum() for members in bins])
    assert (loads <= capacity).all() and (np.diff(loads) <= 0).all()
    assert len(bins) % num_ranks == 0
    # Two rounds fewer would not suffice even for bins that are two thirds full.
    assert (len(bins) // num_ranks - 2) * num_ranks * capacity * 2 / 3 < lengths.sum()


@pytest.mark.parametrize(("capacity", "num_rounds"), [(512, 8), (8192, 1)])
def test_loads_of_a_round_are_balanced(capacity, num_rounds):
    """Many short sequences: loads differ by less than 10 %."""
    rng = np.random.default_rng(0)
    sequences = [sequence(n, 5, int(k)) for n, k in enumerate(rng.integers(5, 60, size=400))]
    ranks = pack(sequences, 4, capacity)
    loads = np.array([[len(batch.token_ids_T) for batch in rank] for rank in ranks])
    assert loads.shape == (4, num_rounds)
    assert (loads.max(axis=0) < 1.1 * loads.min(axis=0)).all()


def test_long_sequences_are_balanced_by_cost():
    """One long sequence costs as much as many short ones with more tokens."""
    sequences = [sequence(0, 1, 399), *(sequence(n, 1, 9) for n in range(1, 121))]
    (one, *more), (other, *others) = pack(sequences, 2, 2000, crossover_tokens=200)
    assert not more and not others
    long, short = sorted((one, other), key=lambda batch: len(batch.token_ids_T))
    assert "source-0" in long.origins and len(long.token_ids_T) <= 450
    assert len(short.token_ids_T) >= 1150


def test_teacher_logprobs_are_packed_and_fillers_have_them_too():
    sequences = [TrainingSequence.of([1], [2, 3], [-1, -2], 1.0, "a", None, [5, 6, 7, 8], [-1, -2, -3, -4])]
    (one,), (filler,) = pack(sequences, 2, 100)
    assert one.teacher_ids_T.tolist() == [[0, 0], [5, 6], [7, 8]]
    assert one.teacher_logprobs_T.tolist() == [[0, 0], [-1, -2], [-3, -4]]
    assert filler.teacher_ids_T.shape == (3, 2) and not filler.trainable_T.any()
    assert one.reference_logprobs_T is filler.reference_logprobs_T is None


def test_a_sequence_that_is_too_long_is_refused():
    sequences = [sequence(1, 2, 3), sequence(2, 6, 3)]
    with pytest.raises(ValueError, match=r"^sequence of 'source-2': expected at most 8 tokens .*, got 9$"):
        pack(sequences, 2, 8)
    assert pack(sequences, 2, 9)


def test_a_step_without_trainable_tokens_is_refused():
    with pytest.raises(ValueError, match=r"at least one trainable token .* 3 sequences"):
        pack([sequence(n, 2, 3, trainable=False) for n in range(3)], 2, 100)


def test_no_sequences_are_refused():
    with pytest.raises(ValueError, match=r"^sequences: expected at least one, got none$"):
        pack([], 2, 8)
