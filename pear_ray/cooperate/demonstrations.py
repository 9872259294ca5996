"""Offline traces by the prompt that they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa
import xxhash

from pear_ray.data.scored_dataset import NUM_READERS, RowFilter, RowGroup, counts, read_group

# Row groups that stay in memory once a row of them was read.
NUM_KEPT = 4
# `Wanted` looks at split, correct and source.
INDEXED = ("prompt_ids", "split", "correct", "source")
READ = (*INDEXED, "response_ids", "behavior_logprobs", "trainable")


@dataclass(frozen=True)
class Demonstration:
    """A row of the scored corpus without its prompt: one log-prob for each token of the response,
    in nats, and whether it is the assistant's (None: all are)."""

    response_ids: tuple[int, ...]
    behavior_logprobs: tuple[float, ...]
    trainable: tuple[bool, ...] | None
    source: str


class DemonstrationIndex:
    """For a prompt the trace to show: of the training rows of `groups` with exactly these prompt
    ids the first, in the order of the groups and of their rows, so that it is always the same.

    Memory is 16 bytes for each row; rows are read when they are asked for. `fingerprint` of ids
    (int32) is any number below 2^64 that is always the same: prompts that share one cost a look.
    """

    def __init__(
        self,
        groups: Sequence[RowGroup],
        wanted: RowFilter,
        fingerprint: Callable[[np.ndarray], int] = lambda ids: xxhash.xxh3_64_intdigest(ids.data),
    ) -> None:
        self._fingerprint = fingerprint
        self._groups = [group for group in groups if group.num_train]
        read = partial(read_group, wanted=wanted, split="train")
        with ThreadPoolExecutor(NUM_READERS) as pool:
            found = list(
                pool.map(
                    lambda group: self._of_each(read(group, columns=INDEXED).column("prompt_ids")),
                    self._groups,
                )
            )
        by_row = np.concatenate([np.empty(0, np.uint64), *found])
        # Rows are numbered over all groups. Of equal fingerprints the first row comes first.
        self._rows = np.argsort(by_row, kind="stable")
        self._fingerprints = by_row[self._rows]
        self._ends = np.cumsum([len(of_group) for of_group in found])
        self._read = lru_cache(NUM_KEPT)(partial(read, columns=READ))

    def find(self, prompt_ids: tuple[int, ...]) -> Demonstration | None:
        """The trace of this prompt; None where there is none."""
        sought = np.asarray(prompt_ids, np.int32)
        fingerprint = np.uint64(self._fingerprint(sought))
        first = np.searchsorted(self._fingerprints, fingerprint, side="left")
        end = np.searchsorted(self._fingerprints, fingerprint, side="right")
        for row in self._rows[first:end].tolist():
            number = int(np.searchsorted(self._ends, row, side="right"))
            table = self._read(self._groups[number])
            place = row - int(self._ends[number]) + table.num_rows
            # Another prompt may have the same fingerprint.
            if np.array_equal(table.column("prompt_ids")[place].values.to_numpy(), sought):
                return trace_at(table, place)
        return None

    def _of_each(self, column: pa.ChunkedArray) -> np.ndarray:
        """Fingerprint of each list, uint64 [rows]."""
        ids = column.combine_chunks().flatten().to_numpy()
        lengths = counts(column)
        ends = np.cumsum(lengths)
        pieces = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
        return np.array([self._fingerprint(ids[start:end]) for start, end in pieces], np.uint64)


def trace_at(table: pa.Table, row: int) -> Demonstration:
    """A row of a table as a trace."""
    response, logprobs, trainable, source = (
        table.column(name)[row].as_py()
        for name in ("response_ids", "behavior_logprobs", "trainable", "source")
    )
    return Demonstration(
        tuple(response),
        tuple(logprobs),
        None if trainable is None else tuple(trainable),
        source,
    )
