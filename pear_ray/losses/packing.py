"""Packing: sequences end to end in micro-batches, distributed evenly over ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from binpacking import to_constant_bin_number

from pear_ray.records import TrainingBatch, TrainingSequence


def pack(
    sequences: Sequence[TrainingSequence],
    num_ranks: int,
    tokens_per_micro_batch: int,
    crossover_tokens: float = math.inf,
    counted: Sequence[TrainingSequence] | None = None,
) -> list[list[TrainingBatch]]:
    """Return [num_ranks][micro-batches] for ONE optimizer step; the same on every rank, given the same sequences.

    All ranks get the same number: under ZeRO-3 a rank that runs one more forward pass than the others hangs. If there
    are too few sequences, a micro-batch repeats the shortest one without trainable tokens. Bins are balanced by cost,
    not by length: at `crossover_tokens`, attention, quadratic in the length, costs as much as everything else.
    `counted` are the sequences that the global counts cover, if some are left out of `sequences` because their loss is
    known to be 0.

    Raises:
        ValueError: no sequence, no trainable token in any, or one longer than a micro-batch.
    """
    if not sequences:
        raise ValueError("sequences: expected at least one, got none")
    lengths = np.array([len(sequence.token_ids) for sequence in sequences])
    if lengths.max() > tokens_per_micro_batch:
        raise ValueError(
            f"sequence of {sequences[int(lengths.argmax())].origin!r}: expected at most {tokens_per_micro_batch} tokens"
            f" (learner.tokens_per_micro_batch of all ranks that share it), got {lengths.max()}"
        )
    counts = global_counts(sequences if counted is None else counted)
    if not counts["num_trainable_tokens_global"]:
        raise ValueError(
            f"sequences: expected at least one trainable token in a step, got none in {len(sequences)} sequences"
        )
    costs = lengths * (1 + lengths / crossover_tokens)
    bins = balanced_bins(lengths, costs, num_ranks, tokens_per_micro_batch)
    filler = without_trainable_tokens(sequences[int(lengths.argmin())])
    batches = [
        # Attention batches neighbors of one length.
        concatenate([sequences[i] for i in sorted(members, key=lambda i: lengths[i])] or [filler], counts)
        for members in bins
    ]
    # Rounds of one micro-batch per rank, most expensive first, in alternating direction: ranks synchronize at every
    # layer, so loads must match in every round and in sum.
    rounds = [batches[start : start + num_ranks] for start in range(0, len(batches), num_ranks)]
    alternating = [one[:: 1 if number % 2 == 0 else -1] for number, one in enumerate(rounds)]
    return [list(own) for own in zip(*alternating, strict=True)]


def balanced_bins(lengths: np.ndarray, costs: np.ndarray, num_ranks: int, capacity: int) -> list[list[int]]:
    """Return indices in bins of similar cost and at most `capacity` tokens, most expensive first: the fewest bins that
    suffice, in multiples of `num_ranks`. Bins may be empty."""
    num_bins = num_ranks * math.ceil(lengths.sum() / (capacity * num_ranks))
    by_index = dict(enumerate(costs.tolist()))
    while True:
        bins = [list(members) for members in to_constant_bin_number(by_index, num_bins)]
        if max(lengths[members].sum() for members in bins) <= capacity:
            return sorted(bins, key=lambda members: -costs[members].sum())
        num_bins += num_ranks


def without_trainable_tokens(sequence: TrainingSequence) -> TrainingSequence:
    """Return a filler: the same tokens, none of them trainable."""
    zeros = np.zeros(len(sequence.token_ids), np.float32)
    blank = {"trainable": zeros.astype(bool), "sampled_logprobs": zeros, "coefficients": zeros}
    return replace(sequence, origin="", from_demonstration=None, **blank)


def global_counts(sequences: Sequence[TrainingSequence]) -> dict[str, int]:
    """Return the counts of a whole step, fields of each of its micro-batches."""
    trainable = np.array([int(sequence.trainable.sum()) for sequence in sequences])
    demonstrated = np.array([0 if s.from_demonstration is None else int(s.from_demonstration.sum()) for s in sequences])
    return {
        "num_trainable_tokens_global": int(trainable.sum()),
        "num_sequences_global": int((trainable > demonstrated).sum()),
        "num_demonstration_tokens_global": int(demonstrated.sum()),
        "num_demonstration_sequences_global": int((demonstrated > 0).sum()),
    }


def concatenate(sequences: Sequence[TrainingSequence], counts: Mapping[str, int]) -> TrainingBatch:
    """Return one micro-batch of these sequences in a global batch with these counts."""
    lengths = [len(sequence.token_ids) for sequence in sequences]
    packed: dict[str, Any] = {
        **counts,
        "position_ids_T": np.concatenate([np.arange(length) for length in lengths]),
        "sequence_ids_T": np.repeat(np.arange(len(lengths)), lengths),
        "origins": tuple(sequence.origin for sequence in sequences),
    }
    for name in [field.name for field in fields(TrainingSequence) if field.name != "origin"]:
        arrays = [getattr(sequence, name) for sequence in sequences]
        present = [array for array in arrays if array is not None]
        if present:
            # Zeros for sequences without the field.
            pairs = zip(arrays, lengths, strict=True)
            zeroed = [np.zeros(length, present[0].dtype) if a is None else a for a, length in pairs]
            packed[f"{name}_T"] = np.concatenate(zeroed)
    return TrainingBatch(**packed)
