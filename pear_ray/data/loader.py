"""The batch loader: a scored corpus to one table of rows per optimizer step.

Ray Data reads ahead while the learners train. An epoch shuffles in two levels: blocks of neighboring rows in random
order form windows, and the rows of a window are permuted. Blocks have a fixed number of rows and ignore row groups,
which differ when a corpus is scored again. So the order depends on rows and seed only, and a position in it is one
integer: a resumed run continues with the row after the last one it trained on.
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

# Windows read concurrently.
NUM_READERS = 2
# More blocks per window shuffle better, and read more row groups only in part.
BLOCKS_PER_WINDOW = 32


@dataclass(frozen=True)
class Slice:
    """Training rows `start` to `stop` of a row group."""

    group: RowGroup
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together; the first `num_skipped` of the result were trained on."""

    epoch: int
    number: int
    slices: tuple[Slice, ...]
    num_skipped: int = 0

    @property
    def num_rows(self) -> int:
        """Number of rows, with the skipped ones."""
        return sum(piece.stop - piece.start for piece in self.slices)


def cut_blocks(groups: Sequence[RowGroup], rows_per_block: int) -> list[list[Slice]]:
    """Cut all training rows, in order, into blocks; the last one may be smaller."""
    blocks: list[list[Slice]] = []
    room = 0
    for group in groups:
        start = 0
        while start < group.num_train:
            if not room:
                blocks.append([])
                room = rows_per_block
            stop = min(group.num_train, start + room)
            blocks[-1].append(Slice(group, start, stop))
            room -= stop - start
            start = stop
    return blocks


def windows(
    groups: Sequence[RowGroup], num_epochs: int, rows_per_window: int, seed: int, position: int
) -> Iterator[Window]:
    """Yield the windows of all epochs from `position` (in rows) on."""
    blocks = cut_blocks(groups, -(-rows_per_window // BLOCKS_PER_WINDOW))
    for epoch in range(num_epochs):
        order = np.random.default_rng(seed_of(seed, "sft", epoch)).permutation(len(blocks))
        slices: list[Slice] = []
        number = 0
        for count, block in enumerate(order, 1):
            slices += blocks[block]
            window = Window(epoch, number, tuple(slices), position)
            if window.num_rows < rows_per_window and count < len(order):
                continue
            if position < window.num_rows:
                yield window
            position = max(0, position - window.num_rows)
            slices, number = [], number + 1


def read_window(batch: dict[str, Any], row_filter: RowFilter, seed: int) -> pa.Table:
    """Return the rows of one window, shuffled; `batch` holds it as a dict (Ray Data's rows)."""
    (window,) = batch["window"]
    groups: dict[tuple[str, int], pa.Table] = {}
    pieces = []
    for piece in window["slices"]:
        group = RowGroup(**piece["group"])
        key = group.file, group.number
        if key not in groups:
            groups[key] = read_row_group(group, row_filter, "train")
        pieces.append(groups[key].slice(piece["start"], piece["stop"] - piece["start"]))
    table = pa.concat_tables(pieces)
    rng = np.random.default_rng(seed_of(seed, "sft", window["epoch"], window["number"]))
    order = rng.permutation(table.num_rows)[window["num_skipped"] :]
    return table.take(pa.array(order)).combine_chunks()


def batches(
    groups: Sequence[RowGroup],
    row_filter: RowFilter,
    *,
    num_epochs: int,
    rows_per_step: int,
    rows_per_window: int,
    seed: int,
    first_step: int,
) -> Iterator[pa.Table]:
    """Yield the rows of each optimizer step from `first_step` on.

    A step may span two epochs; only the very last one may be smaller.
    """
    position = first_step * rows_per_step
    items = [{"window": asdict(window)} for window in windows(groups, num_epochs, rows_per_window, seed, position)]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read_window,
        batch_size=1,
        fn_kwargs={"row_filter": row_filter, "seed": seed},
        # Learners may hold all CPUs; reading takes little of one.
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(NUM_READERS),
    )
    dataset.context.execution_options.preserve_order = True
    dataset.set_name("sft")
    # Plans and progress would fill the job's log; the Ray dashboard shows them.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    yield from dataset.iter_batches(batch_size=rows_per_step, batch_format="pyarrow", prefetch_batches=2)
