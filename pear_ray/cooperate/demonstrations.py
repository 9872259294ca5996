"""Demonstrations: offline traces of the scored corpus, found by the prompt that they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import xxhash

from pear_ray.data.scored_dataset import NUM_READERS, RowFilter, RowGroup, list_lengths, read_row_group
from pear_ray.records import TrainingSequence

# Row groups that stay in memory after a row of them was read.
NUM_CACHED = 4
# `RowFilter` needs split, correct and source.
INDEXED = ("prompt_ids", "split", "correct", "source")
READ = (*INDEXED, "response_ids", "behavior_logprobs", "trainable")


@dataclass(frozen=True)
class Demonstration:
    """A row of the scored corpus without its prompt: the log-prob (nats) of each response token under its author's
    policy, and which tokens are the assistant's (None: all).

        Demonstration((11, 43, 1), (-0.7, -1.2, -0.01), None, "tutor")
    """

    response_ids: tuple[int, ...]
    behavior_logprobs: tuple[float, ...]
    trainable: tuple[bool, ...] | None
    source: str

    def first_answer(self) -> Demonstration:
        """Return the part before the first token that is not the assistant's."""
        if self.trainable is None or all(self.trainable):
            return self
        end = self.trainable.index(False)
        return Demonstration(self.response_ids[:end], self.behavior_logprobs[:end], None, self.source)

    def training_sequence(self, prompt_ids: tuple[int, ...]) -> TrainingSequence:
        """Return prompt and response, with coefficient 1."""
        ids, logprobs = self.response_ids, self.behavior_logprobs
        return TrainingSequence.of(prompt_ids, ids, logprobs, 1.0, self.source, self.trainable)


class DemonstrationIndex:
    """Index of the training rows of `groups` by prompt. Of rows with the same prompt the first counts, in the order of
    groups and rows.

    It takes 16 bytes of memory per row; rows are read on demand. `fingerprint` maps prompt ids (int32) to a number
    below 2^64, the same in every process; a collision costs one more read.
    """

    def __init__(
        self,
        groups: Sequence[RowGroup],
        row_filter: RowFilter,
        fingerprint: Callable[[np.ndarray], int] = lambda ids: xxhash.xxh3_64_intdigest(ids.data),
    ) -> None:
        self._fingerprint = fingerprint
        self._groups = [group for group in groups if group.num_train]
        read = partial(read_row_group, row_filter=row_filter, split="train")
        self._read = lru_cache(NUM_CACHED)(partial(read, columns=READ))
        self._read_indexed = partial(read, columns=INDEXED)
        with ThreadPoolExecutor(NUM_READERS) as pool:
            by_group = list(pool.map(self._fingerprint_rows, self._groups))
        by_row = np.concatenate([np.empty(0, np.uint64), *by_group])
        # Row numbers run through all groups. A stable sort puts the first of equal rows first.
        self._rows = np.argsort(by_row, kind="stable")
        self._fingerprints = by_row[self._rows]
        self._group_ends = np.cumsum([len(rows) for rows in by_group])

    def find(self, prompt_ids: tuple[int, ...]) -> Demonstration | None:
        """Return the demonstration of a prompt, None if there is none."""
        fingerprint = np.uint64(self._fingerprint(np.asarray(prompt_ids, np.int32)))
        start = np.searchsorted(self._fingerprints, fingerprint, side="left")
        end = np.searchsorted(self._fingerprints, fingerprint, side="right")
        for number in self._rows[start:end].tolist():
            group = int(np.searchsorted(self._group_ends, number, side="right"))
            table = self._read(self._groups[group])
            offset = number - int(self._group_ends[group]) + table.num_rows
            (row,) = table.slice(offset, 1).to_pylist()
            # Another prompt may have the same fingerprint.
            if tuple(row["prompt_ids"]) == prompt_ids:
                return Demonstration(
                    tuple(row["response_ids"]),
                    tuple(row["behavior_logprobs"]),
                    None if row["trainable"] is None else tuple(row["trainable"]),
                    row["source"],
                )
        return None

    def _fingerprint_rows(self, group: RowGroup) -> np.ndarray:
        """Return the fingerprint of each row's prompt, uint64 [rows]."""
        prompts = self._read_indexed(group).column("prompt_ids")
        ids = prompts.combine_chunks().flatten().to_numpy()
        lengths = list_lengths(prompts)
        ends = np.cumsum(lengths)
        bounds = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
        return np.array([self._fingerprint(ids[start:end]) for start, end in bounds], np.uint64)
