"""Windows and batches of rows: each row once per epoch, resumable from any position."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pear_ray.data.scored_dataset import (
    BLOCKS_PER_WINDOW,
    RowGroup,
    Slice,
    Window,
    batches,
    read_window,
    scan_dataset,
    training_sequences,
    windows,
)
from tests.data.scored_rows import WANTED, row, stored, table_of

ROWS_PER_GROUP = 4


def groups_of(sizes):
    return [RowGroup("x.parquet", n, size, 0, ("teacher_plain",)) for n, size in enumerate(sizes)]


def row_numbers(drawn, sizes):
    """(epoch, row number) of each row of the windows, before shuffling."""
    firsts = np.cumsum([0, *sizes])
    return [
        (window.epoch, int(firsts[piece.group.number]) + row)
        for window in drawn
        for piece in window.slices
        for row in range(piece.start, piece.stop)
    ]


def rows_of(drawn):
    """Window and position of each row that is not skipped."""
    return [
        (window.epoch, window.number, window.slices, place)
        for window in drawn
        for place in range(window.num_skipped, window.num_rows)
    ]


some_sizes = st.lists(st.integers(0, 20), max_size=12)
plans = {
    "sizes": some_sizes,
    "num_epochs": st.integers(0, 3),
    "rows_per_window": st.integers(1, 40),
    "seed": st.integers(0, 2**40),
}


@settings(deadline=None)
@given(**plans)
def test_windows_hold_every_row_once_per_epoch(sizes, num_epochs, rows_per_window, seed):
    drawn = list(windows(groups_of(sizes), num_epochs, rows_per_window, seed, 0))
    found = row_numbers(drawn, sizes)
    assert sorted(found) == [(e, row) for e in range(num_epochs) for row in range(sum(sizes))]
    assert [window.epoch for window in drawn] == sorted(window.epoch for window in drawn)
    names = [(window.epoch, window.number) for window in drawn]
    assert names == sorted(set(names))
    assert all(window.num_skipped == 0 < window.num_rows for window in drawn)


@settings(deadline=None)
@given(**plans, data=st.data())
def test_windows_resume_from_any_position(sizes, num_epochs, rows_per_window, seed, data):
    plan = (groups_of(sizes), num_epochs, rows_per_window, seed)
    uninterrupted = rows_of(windows(*plan, 0))
    assert len(uninterrupted) == num_epochs * sum(sizes)
    position = data.draw(st.integers(0, len(uninterrupted) + 3))
    drawn = list(windows(*plan, position))
    assert rows_of(drawn) == uninterrupted[position:]
    # Only the first window may skip rows, and none skips all of them.
    assert not any(window.num_skipped for window in drawn[1:])
    assert all(window.num_skipped < window.num_rows for window in drawn)


@settings(deadline=None)
@given(**plans, cuts=st.sets(st.integers(1, 200)), more_epochs=st.integers(0, 3))
def test_order_does_not_depend_on_row_groups_or_number_of_epochs(
    sizes, num_epochs, rows_per_window, seed, cuts, more_epochs
):
    ends = [*sorted(cut for cut in cuts if cut < sum(sizes)), sum(sizes)]
    others = np.diff([0, *ends]).tolist()
    plans = ((sizes, num_epochs), (others, num_epochs + more_epochs))
    order, same = (row_numbers(windows(groups_of(s), epochs, rows_per_window, seed, 0), s) for s, epochs in plans)
    assert same[: len(order)] == order


def test_order_differs_between_epochs_and_seeds():
    sizes = [3] * 50
    plans = [row_numbers(windows(groups_of(sizes), 2, 9, seed, 0), sizes) for seed in (0, 1, 2**40)]
    orders = [tuple(n for e, n in plan if e == epoch) for plan in plans for epoch in range(2)]
    assert len({*orders, tuple(range(150))}) == 7


@settings(deadline=None)
@example(sizes=[6] * 9, num_epochs=1, rows_per_window=10, seed=0)
@example(sizes=[5] * 8, num_epochs=1, rows_per_window=10, seed=0)
@given(**plans)
def test_windows_exceed_their_size_by_less_than_a_block(sizes, num_epochs, rows_per_window, seed):
    """A worker holds a window in memory; only the last one of an epoch may be smaller."""
    rows_per_block = -(-rows_per_window // BLOCKS_PER_WINDOW)
    all_windows = list(windows(groups_of(sizes), num_epochs, rows_per_window, seed, 0))
    last = {window.epoch: window for window in all_windows}
    for window in all_windows:
        assert window.num_rows >= rows_per_window or window is last[window.epoch], window.num_rows
        assert window.num_rows < rows_per_window + rows_per_block


def numbered_row(number, length):
    """Every fifth row is held out, every seventh is known to be wrong."""
    return row(
        f"row-{number:02d}",
        prompt_ids=[4, 5 + number],
        response_ids=[number, *range(length)],
        behavior_logprobs=[-number / 64] * (1 + length),
        split="heldout" if number % 5 == 4 else "train",
        correct=number % 7 != 6,
        top_ids=None,
        top_logprobs=None,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Rows over three files, and their row groups."""
    folder = tmp_path_factory.mktemp("scored")
    rows = [numbered_row(number, number % 4) for number in range(45)]
    tables = [table_of(*rows[start:stop]) for start, stop in ((0, 19), (19, 20), (20, 45))]
    stored(folder, *tables, rows_per_group=ROWS_PER_GROUP)
    groups = scan_dataset(folder, WANTED)
    assert len(groups) == 13
    selected = [one for one in rows if one["split"] == "train" and one["correct"]]
    assert len(selected) == sum(group.num_train for group in groups) == 31
    return groups, {one["example_id"]: one for one in selected}


def all_rows(groups):
    return tuple(Slice(group, 0, group.num_train) for group in groups)


def read(window, seed):
    return read_window({"window": [asdict(window)]}, WANTED, seed)


def names_of(tables):
    return [name for table in tables for name in table.column("example_id").to_pylist()]


def assert_rows_of(found, rows):
    """Assert that all rows are intact; columns may be missing."""
    for one in found:
        whole = rows[one["example_id"]]
        assert {**whole, **one} == whole and one["response_ids"] == whole["response_ids"]


def test_rows_of_a_window_are_shuffled_and_intact(corpus):
    groups, rows = corpus
    window = Window(0, 0, all_rows(groups))
    found = read(window, seed=0).to_pylist()
    names = [one["example_id"] for one in found]
    assert_rows_of(found, rows)
    assert sorted(names) == sorted(rows)
    # Neighbors in a file, and row groups, are torn apart.
    numbers = [int(name.removeprefix("row-")) for name in names]
    pairs = list(pairwise(numbers))
    assert sum(0 < second - first < ROWS_PER_GROUP for first, second in pairs) < len(pairs) / 3


def test_shuffle_depends_on_seed_epoch_and_window(corpus):
    groups, _ = corpus
    first, *others = (
        names_of([read(Window(epoch, number, all_rows(groups)), seed)])
        for epoch, number, seed in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    )
    assert first == names_of([read(Window(0, 0, all_rows(groups)), 0)])
    assert len({tuple(first), *map(tuple, others)}) == 4
    assert all(sorted(other) == sorted(first) for other in others)


@settings(max_examples=25, deadline=None)
@given(rows_per_window=st.integers(1, 40), seed=st.integers(0, 2**40), position=st.integers(0, 2 * 31))
def test_rows_are_the_same_from_any_position(corpus, rows_per_window, seed, position):
    groups, rows = corpus
    plan = (groups, 2, rows_per_window, seed)
    uninterrupted = names_of(read(window, seed) for window in windows(*plan, 0))
    assert sorted(uninterrupted[:31]) == sorted(uninterrupted[31:]) == sorted(rows)
    resumed = names_of(read(window, seed) for window in windows(*plan, position))
    assert resumed == uninterrupted[position:]


def test_files_with_different_columns_are_mixed(tmp_path):
    """Datasets of several origins may be combined; optional columns may be missing."""
    table = table_of(*(numbered_row(number, 2) for number in range(3)))
    bare = table.drop_columns(["top_ids", "top_logprobs", "recorded_gap"])
    blank = bare.append_column("recorded_gap", pa.nulls(3))
    groups = scan_dataset(stored(tmp_path, table, bare, blank), WANTED)
    found = read(Window(0, 0, all_rows(groups)), seed=0)
    assert Counter(names_of([found])) == dict.fromkeys(["row-00", "row-01", "row-02"], 3)


def contents(table):
    """Training sequences of a step's rows, as bytes."""
    arrays = ("token_ids", "trainable", "sampled_logprobs", "coefficients")
    rows = training_sequences(table, 0.1)
    return [(one.origin, *(getattr(one, name).tobytes() for name in arrays)) for one in rows]


def read_batches(groups, first_step=0, **changes):
    plan = {"num_epochs": 2, "rows_per_step": 7, "rows_per_window": 10, "seed": 3} | changes
    return list(batches(groups, WANTED, **plan, first_step=first_step))


@pytest.fixture(scope="module")
def uninterrupted(ray_session, corpus):
    """The batches of an uninterrupted run."""
    return read_batches(corpus[0])


def test_batches_have_one_size_and_hold_each_row_once_per_epoch(corpus, uninterrupted):
    groups, rows = corpus
    assert [table.num_rows for table in uninterrupted] == [7] * 8 + [6]
    names = names_of(uninterrupted)
    assert sorted(names[:31]) == sorted(names[31:]) == sorted(rows)
    assert names[:31] != names[31:]
    assert names == names_of(read(window, 3) for window in windows(groups, 2, 10, 3, 0))
    assert_rows_of([one for table in uninterrupted for one in table.to_pylist()], rows)


@pytest.mark.parametrize("first_step", [1, 4, 8])
def test_resumed_batches_equal_the_uninterrupted_ones(corpus, uninterrupted, first_step):
    """In the first epoch, at the step across its end, and at the last step."""
    resumed = read_batches(corpus[0], first_step)
    assert len(resumed) == 9 - first_step
    for found, expected in zip(resumed, uninterrupted[first_step:], strict=True):
        assert found.equals(expected)
        assert contents(found) == contents(expected)
