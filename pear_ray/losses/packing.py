"""Sequences end to end in micro-batches, dealt evenly over ranks."""

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
    """The micro-batches of every rank for ONE optimizer step.

    All ranks get equally many: under ZeRO-3 a rank that runs one more forward pass than the
    others waits for ever. Where sequences do not suffice, a micro-batch repeats the shortest
    sequence with nothing to learn in it.

    Args:
        sequences: what the step learns from, in any order.
        num_ranks: ranks that share the work.
        tokens_per_micro_batch: most tokens in one micro-batch.
        crossover_tokens: length at which attention, quadratic in the length of a sequence, costs
            as much as everything else; sequences are dealt by cost, not by length.
        counted: what the global counts are of, where the others of a step are left out since
            their loss is known to be 0; without it `sequences`.

    Returns:
        [num_ranks][micro-batches]; the same on every rank that is given the same sequences.

    Raises:
        ValueError: no sequence, no trainable token in any, or one longer than a micro-batch.
    """
    if not sequences:
        raise ValueError("expected at least one sequence to pack, read none")
    lengths = np.array([len(sequence.token_ids) for sequence in sequences])
    if lengths.max() > tokens_per_micro_batch:
        longest = sequences[int(lengths.argmax())]
        raise ValueError(
            f"sequence of {longest.origin!r} has {lengths.max()} tokens; expected at most"
            f" {tokens_per_micro_batch}, learner.tokens_per_micro_batch of all ranks that share it"
        )
    counts = counts_of(sequences if counted is None else counted)
    if not counts["num_trainable_tokens_global"]:
        raise ValueError(
            f"expected at least one trainable token in a step, read none in its"
            f" {len(sequences)} sequences"
        )
    costs = lengths * (1 + lengths / crossover_tokens)
    bins = even_bins(lengths, costs, num_ranks, tokens_per_micro_batch)
    filler = nothing_to_learn(sequences[int(lengths.argmin())])
    batches = [
        # Attention takes sequences of one length together where they are neighbors.
        batch_of(
            [sequences[i] for i in sorted(members, key=lambda i: lengths[i])] or [filler],
            counts,
        )
        for members in bins
    ]
    # Rounds of one micro-batch per rank, dearest first, dealt there and back: ranks that wait for
    # each other at every layer carry like loads in every round and in sum.
    rounds = [batches[start : start + num_ranks] for start in range(0, len(batches), num_ranks)]
    there_and_back = [one[:: 1 if number % 2 == 0 else -1] for number, one in enumerate(rounds)]
    return [list(own) for own in zip(*there_and_back, strict=True)]


def even_bins(
    lengths: np.ndarray, costs: np.ndarray, num_ranks: int, capacity: int
) -> list[list[int]]:
    """Indices in bins of like cost and of at most `capacity` tokens, the dearest first: as few
    bins as that takes, in multiples of `num_ranks`. Some are empty where indices do not suffice."""
    num_bins = num_ranks * math.ceil(lengths.sum() / (capacity * num_ranks))
    by_index = dict(enumerate(costs.tolist()))
    while True:
        bins = [list(members) for members in to_constant_bin_number(by_index, num_bins)]
        if max(lengths[members].sum() for members in bins) <= capacity:
            return sorted(bins, key=lambda members: -costs[members].sum())
        num_bins += num_ranks


def nothing_to_learn(sequence: TrainingSequence) -> TrainingSequence:
    """The same tokens, none of them trainable."""
    zeros = np.zeros(len(sequence.token_ids), np.float32)
    blank = {"trainable": zeros.astype(bool), "sampled_logprobs": zeros, "coefficients": zeros}
    return replace(sequence, origin="", from_trace=None, **blank)


def counts_of(sequences: Sequence[TrainingSequence]) -> dict[str, int]:
    """What every micro-batch of a step says of the whole of it."""
    num_trainable = np.array([int(sequence.trainable.sum()) for sequence in sequences])
    of_trace = (sequence.from_trace for sequence in sequences)
    num_of_trace = np.array([0 if tokens is None else int(tokens.sum()) for tokens in of_trace])
    return {
        "num_trainable_tokens_global": int(num_trainable.sum()),
        "num_sequences_global": int((num_trainable > num_of_trace).sum()),
        "num_trace_tokens_global": int(num_of_trace.sum()),
        "num_trace_sequences_global": int((num_of_trace > 0).sum()),
    }


def batch_of(sequences: Sequence[TrainingSequence], counts: Mapping[str, int]) -> TrainingBatch:
    """A micro-batch of these sequences in a global batch of these counts."""
    lengths = [len(sequence.token_ids) for sequence in sequences]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(sequence, name) for sequence in sequences])

    def joined_if_any(name: str, dtype: type = np.float32) -> np.ndarray | None:
        """Zero for sequences without it."""
        found = [getattr(sequence, name) for sequence in sequences]
        if all(array is None for array in found):
            return None
        pairs = zip(found, lengths, strict=True)
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
        from_trace_T=joined_if_any("from_trace", bool),
        **counts,
    )
