"""From a scored corpus to one table of rows for each optimizer step.

Ray Data reads ahead while learners learn. Rows are dealt in windows: blocks of neighbors in random
order, so many together that their rows are well mixed, and the rows of a window in random order. A
block begins after so many rows and not where a row group does, for these are cut elsewhere whenever
a corpus is scored anew. So the order depends on rows and seed alone, and a position in it is a
whole number: a run goes on with the row after the last one that it learned from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from pear_ray.data.scored_dataset import RowFilter, RowGroup, read_row_group
from pear_ray.seeds import seed_of

# Windows that are read at the same time.
NUM_READERS = 2


# Of so many blocks a window is made: more are better mixed, and read more row groups in part.
BLOCKS_PER_WINDOW = 32


@dataclass(frozen=True)
class Slice:
    """Training rows of a row group, from `start` to `stop`."""

    group: RowGroup
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows that are mixed, in one epoch; the first `num_skipped` mixed rows were learned from
    before."""

    epoch: int
    number: int
    slices: tuple[Slice, ...]
    num_skipped: int = 0

    @property
    def num_rows(self) -> int:
        """Training rows in the window."""
        return sum(piece.stop - piece.start for piece in self.slices)


def blocks(groups: Sequence[RowGroup], rows_per_block: int) -> list[list[Slice]]:
    """All training rows in order, cut after every so many; the last block may be smaller."""
    found: list[list[Slice]] = []
    room = 0
    for group in groups:
        start = 0
        while start < group.num_train:
            if not room:
                found.append([])
                room = rows_per_block
            stop = min(group.num_train, start + room)
            found[-1].append(Slice(group, start, stop))
            room -= stop - start
            start = stop
    return found


def windows(
    groups: Sequence[RowGroup], num_epochs: int, rows_per_window: int, seed: int, position: int
) -> Iterator[Window]:
    """All windows of all epochs from `position` on, counted in rows."""
    cut = blocks(groups, -(-rows_per_window // BLOCKS_PER_WINDOW))
    for epoch in range(num_epochs):
        order = np.random.default_rng(seed_of(seed, "sft", epoch)).permutation(len(cut))
        held: list[Slice] = []
        number = 0
        for place, block in enumerate(order, 1):
            held += cut[block]
            window = Window(epoch, number, tuple(held), position)
            if window.num_rows < rows_per_window and place < len(order):
                continue
            if position < window.num_rows:
                yield window
            position = max(0, position - window.num_rows)
            held, number = [], number + 1


def read_window(batch: dict[str, Any], wanted: RowFilter, seed: int) -> pa.Table:
    """The rows of one window, mixed."""
    (window,) = batch["window"]
    groups: dict[tuple[str, int], pa.Table] = {}
    pieces = []
    for piece in window["slices"]:
        group = RowGroup(**piece["group"])
        where = group.file, group.number
        if where not in groups:
            groups[where] = read_row_group(group, wanted, "train")
        pieces.append(groups[where].slice(piece["start"], piece["stop"] - piece["start"]))
    table = pa.concat_tables(pieces)
    mixed = np.random.default_rng(seed_of(seed, "sft", window["epoch"], window["number"]))
    order = mixed.permutation(table.num_rows)[window["num_skipped"] :]
    return table.take(pa.array(order)).combine_chunks()


def batches(
    groups: Sequence[RowGroup],
    wanted: RowFilter,
    *,
    num_epochs: int,
    rows_per_step: int,
    rows_per_window: int,
    seed: int,
    first_step: int,
) -> Iterator[pa.Table]:
    """The rows of each optimizer step from `first_step` on. Steps go on over the end of an epoch;
    only the last one of all may be smaller."""
    position = first_step * rows_per_step
    items = [
        {"window": asdict(window)}
        for window in windows(groups, num_epochs, rows_per_window, seed, position)
    ]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read_window,
        batch_size=1,
        fn_kwargs={"wanted": wanted, "seed": seed},
        # Learners may hold all CPUs there are; reading takes a little of one.
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(NUM_READERS),
    )
    dataset.context.execution_options.preserve_order = True
    dataset.set_name("sft")
    # Its plans and progress fill the log of a job; they are on the dashboard.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    yield from dataset.iter_batches(
        batch_size=rows_per_step, batch_format="pyarrow", prefetch_batches=2
    )
