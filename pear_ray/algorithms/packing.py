"""Sequences end to end in micro-batches, dealt evenly over ranks."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from pear_ray.records import TrainingBatch, TrainingSequence


def pack(
    sequences: Sequence[TrainingSequence], num_ranks: int, tokens_per_micro_batch: int
) -> list[list[TrainingBatch]]:
    """The micro-batches of every rank for ONE optimiser step.

    All ranks get equally many: under ZeRO-3 a rank that runs one more forward pass than the
    others waits for ever. Where sequences do not suffice, a micro-batch repeats the shortest
    sequence with nothing to learn in it.

    Returns:
        [num_ranks][micro-batches]; the same on every rank that is given the same sequences.

    Raises:
        ValueError: no sequence, or one longer than a micro-batch.
    """
    if not sequences:
        raise ValueError("expected at least one sequence to pack, read none")
    lengths = [len(sequence.token_ids) for sequence in sequences]
    if max(lengths) > tokens_per_micro_batch:
        longest = sequences[int(np.argmax(lengths))]
        raise ValueError(
            f"sequence of {longest.origin!r} has {max(lengths)} tokens; expected at most"
            f" learner.tokens_per_micro_batch = {tokens_per_micro_batch}"
        )
    even_share = -(-sum(lengths) // num_ranks)
    bins = best_fit(lengths, max(max(lengths), min(tokens_per_micro_batch, even_share)))
    num_tokens = sum(int(sequence.trainable.sum()) for sequence in sequences)
    counts = (num_tokens, len(sequences))
    filler = sequences[int(np.argmin(lengths))]
    batches = [_batch([sequences[i] for i in members], *counts) for members in bins]
    while len(batches) % num_ranks:
        batches.append(_batch([_nothing_to_learn(filler)], *counts))
    ranks: list[list[TrainingBatch]] = [[] for _ in range(num_ranks)]
    # Rounds of one micro-batch per rank, fullest first, dealt there and back: ranks that wait
    # for each other at every layer carry like loads in every round and in sum.
    for start in range(0, len(batches), num_ranks):
        one_round = batches[start : start + num_ranks]
        forwards = (start // num_ranks) % 2 == 0
        for rank, batch in zip(ranks, one_round if forwards else one_round[::-1], strict=True):
            rank.append(batch)
    return ranks


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: members of each bin as indices, fullest bin first."""
    free: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = bisect_left(free, (lengths[index], -1))
        if slot == len(free):
            bins.append([])
            room, number = capacity, len(bins) - 1
        else:
            room, number = free.pop(slot)
        bins[number].append(index)
        insort(free, (room - lengths[index], number))
    return [bins[number] for _, number in free]


def _nothing_to_learn(sequence: TrainingSequence) -> TrainingSequence:
    zeros = np.zeros(len(sequence.token_ids), np.float32)
    return TrainingSequence(sequence.token_ids, zeros.astype(bool), zeros, zeros, "")


def _batch(
    sequences: list[TrainingSequence], num_trainable_tokens: int, num_sequences: int
) -> TrainingBatch:
    lengths = [len(sequence.token_ids) for sequence in sequences]
    return TrainingBatch(
        token_ids_T=np.concatenate([s.token_ids for s in sequences]),
        position_ids_T=np.concatenate([np.arange(length) for length in lengths]),
        sequence_ids_T=np.repeat(np.arange(len(lengths)), lengths),
        trainable_T=np.concatenate([s.trainable for s in sequences]),
        sampled_logprobs_T=np.concatenate([s.sampled_logprobs for s in sequences]),
        coefficients_T=np.concatenate([s.coefficients for s in sequences]),
        origins=tuple(s.origin for s in sequences),
        num_trainable_tokens_global=num_trainable_tokens,
        num_sequences_global=num_sequences,
    )
