"""Packing: sequences end to end in micro-batches, distributed evenly over ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

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
    """Return the micro-batches of every rank for ONE optimizer step.

    All ranks get the same number: under ZeRO-3 a rank that runs one more forward pass than the others hangs. If there
    are too few sequences, a micro-batch repeats the shortest one without trainable tokens.

    Args:
        sequences: the sequences of the step, in any order.
        num_ranks: data-parallel ranks.
        tokens_per_micro_batch: maximum tokens of a micro-batch.
        crossover_tokens: sequence length at which attention, quadratic in the length, costs as
            much as everything else; bins are balanced by cost, not by length.
        counted: the sequences that the global counts cover, if some are left out of `sequences`
            because their loss is known to be 0.

    Returns:
        [num_ranks][micro-batches]; the same on every rank, given the same sequences.

    Raises:
        ValueError: no sequence, no trainable token in any, or one longer than a micro-batch.
    """
    if not sequences:
        raise ValueError("sequences: expected at least one, got none")
    lengths = np.array([len(sequence.token_ids) for sequence in sequences])
    if lengths.max() > tokens_per_micro_batch:
        longest = sequences[int(lengths.argmax())]
        raise ValueError(
            f"sequence of {longest.origin!r}: expected at most {tokens_per_micro_batch} tokens"
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
    masks = (sequence.from_demonstration for sequence in sequences)
    demonstrated = np.array([0 if mask is None else int(mask.sum()) for mask in masks])
    return {
        "num_trainable_tokens_global": int(trainable.sum()),
        "num_sequences_global": int((trainable > demonstrated).sum()),
        "num_demonstration_tokens_global": int(demonstrated.sum()),
        "num_demonstration_sequences_global": int((demonstrated > 0).sum()),
    }


def concatenate(sequences: Sequence[TrainingSequence], counts: Mapping[str, int]) -> TrainingBatch:
    """Return one micro-batch of these sequences in a global batch with these counts."""
    lengths = [len(sequence.token_ids) for sequence in sequences]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(sequence, name) for sequence in sequences])

    def joined_if_any(name: str, dtype: type = np.float32) -> np.ndarray | None:
        """Fill in zeros for sequences without the field; None if all lack it."""
        arrays = [getattr(sequence, name) for sequence in sequences]
        if all(array is None for array in arrays):
            return None
        pairs = zip(arrays, lengths, strict=True)
        return np.concatenate([np.zeros(n, dtype) if a is None else a for a, n in pairs])

    return TrainingBatch(
        token_ids_T=joined("token_ids"),
        position_ids_T=np.concatenate([np.arange(length) for length in lengths]),
        sequence_ids_T=np.repeat(np.arange(len(lengths)), lengths),
        trainable_T=joined("trainable"),
        sampled_logprobs_T=joined("sampled_logprobs"),
        coefficients_T=joined("coefficients"),
        origins=tuple(sequence.origin for sequence in sequences),
        teacher_ids_T=joined_if_any("teacher_ids"),
        teacher_logprobs_T=joined_if_any("teacher_logprobs"),
        reference_logprobs_T=joined_if_any("reference_logprobs"),
        from_demonstration_T=joined_if_any("from_demonstration", bool),
        **counts,
    )
