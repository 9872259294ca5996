"""Rows dealt in windows and in steps: each once an epoch, and the rest alike from any position."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pear_ray.data.loader import BLOCKS_PER_WINDOW, Slice, Window, batches, read_window, windows
from pear_ray.data.scored_dataset import RowFilter, RowGroup, scan_dataset, training_sequences
from pear_ray.records import SCORED_SCHEMA

WANTED = RowFilter(
    digests=("vocabulary", "template"),
    vocab_size=100,
    max_tokens=8,
    negatives=False,
    top_logprobs=False,
)
ROWS_PER_GROUP = 4


def groups_of(sizes):
    return [RowGroup("x.parquet", n, size, 0, ("tutor",)) for n, size in enumerate(sizes)]


def in_order(dealt, sizes):
    """(epoch, number of the row) as often and in the order in which they are dealt, unmixed."""
    firsts = np.cumsum([0, *sizes])
    return [
        (window.epoch, int(firsts[piece.group.number]) + row)
        for window in dealt
        for piece in window.slices
        for row in range(piece.start, piece.stop)
    ]


def rows_of(dealt):
    """Every row that is learned from, by the window and the place in it."""
    return [
        (window.epoch, window.number, window.slices, place)
        for window in dealt
        for place in range(window.num_skipped, window.num_rows)
    ]


some_sizes = st.lists(st.integers(0, 20), max_size=12)
a_plan = {
    "sizes": some_sizes,
    "num_epochs": st.integers(0, 3),
    "rows_per_window": st.integers(1, 40),
    "seed": st.integers(0, 2**40),
}


@settings(deadline=None)
@given(**a_plan)
def test_every_row_is_dealt_once_an_epoch(sizes, num_epochs, rows_per_window, seed):
    dealt = list(windows(groups_of(sizes), num_epochs, rows_per_window, seed, 0))
    found = in_order(dealt, sizes)
    assert sorted(found) == [(e, row) for e in range(num_epochs) for row in range(sum(sizes))]
    assert [window.epoch for window in dealt] == sorted(window.epoch for window in dealt)
    names = [(window.epoch, window.number) for window in dealt]
    assert names == sorted(set(names))
    assert all(window.num_skipped == 0 < window.num_rows for window in dealt)


@settings(deadline=None)
@given(**a_plan, data=st.data())
def test_from_any_position_on_the_rest_is_dealt(sizes, num_epochs, rows_per_window, seed, data):
    plan = (groups_of(sizes), num_epochs, rows_per_window, seed)
    undisturbed = rows_of(windows(*plan, 0))
    assert len(undisturbed) == num_epochs * sum(sizes)
    position = data.draw(st.integers(0, len(undisturbed) + 3))
    dealt = list(windows(*plan, position))
    assert rows_of(dealt) == undisturbed[position:]
    # Only the first window was begun before, and none is dealt for nothing.
    assert not any(window.num_skipped for window in dealt[1:])
    assert all(window.num_skipped < window.num_rows for window in dealt)


@settings(deadline=None)
@given(**a_plan, cuts=st.sets(st.integers(1, 200)), more_epochs=st.integers(0, 3))
def test_the_order_depends_on_rows_and_seed_and_not_on_where_row_groups_begin(
    sizes, num_epochs, rows_per_window, seed, cuts, more_epochs
):
    ends = [*sorted(cut for cut in cuts if cut < sum(sizes)), sum(sizes)]
    others = np.diff([0, *ends]).tolist()
    plans = ((sizes, num_epochs), (others, num_epochs + more_epochs))
    order, same = (
        in_order(windows(groups_of(s), epochs, rows_per_window, seed, 0), s) for s, epochs in plans
    )
    assert same[: len(order)] == order


def test_the_order_differs_from_epoch_to_epoch_and_from_seed_to_seed():
    sizes = [3] * 50
    plans = [in_order(windows(groups_of(sizes), 2, 9, seed, 0), sizes) for seed in (0, 1, 2**40)]
    orders = [tuple(n for e, n in plan if e == epoch) for plan in plans for epoch in range(2)]
    assert len({*orders, tuple(range(150))}) == 7


@settings(deadline=None)
@example(sizes=[6] * 9, num_epochs=1, rows_per_window=10, seed=0)
@given(**a_plan)
def test_windows_are_as_large_as_they_should_be_but_the_last(
    sizes, num_epochs, rows_per_window, seed
):
    dealt = list(windows(groups_of(sizes), num_epochs, rows_per_window, seed, 0))
    last = {window.epoch: window for window in dealt}
    for window in dealt:
        assert window.num_rows >= rows_per_window or window is last[window.epoch], window.num_rows


@settings(deadline=None)
@example(sizes=[5] * 8, num_epochs=1, rows_per_window=10, seed=0)
@given(**a_plan)
def test_windows_are_no_larger_than_they_need_be(sizes, num_epochs, rows_per_window, seed):
    """A window is what a machine holds in memory."""
    rows_per_block = -(-rows_per_window // BLOCKS_PER_WINDOW)
    for window in windows(groups_of(sizes), num_epochs, rows_per_window, seed, 0):
        assert window.num_rows < rows_per_window + rows_per_block


def row(number, length):
    """Every fifth is held out, every seventh is known to be wrong."""
    return {
        "example_id": f"row-{number:02d}",
        "prompt_ids": [4, 5 + number],
        "response_ids": [number, *range(length)],
        "behavior_logprobs": [-number / 64] * (1 + length),
        "behavior_model": "models/tutor",
        "source": "tutor",
        "tokenizer_digest": "vocabulary",
        "template_digest": "template",
        "split": "heldout" if number % 5 == 4 else "train",
        "correct": number % 7 != 6,
        "recorded_gap": None,
        "trainable": None,
        "truncated": False,
        "logprobs_from": "behavior",
        "top_ids": None,
        "top_logprobs": None,
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Rows over three files, and where they are."""
    folder = tmp_path_factory.mktemp("scored")
    rows = [row(number, number % 4) for number in range(45)]
    for number, (start, stop) in enumerate([(0, 19), (19, 20), (20, 45)]):
        table = pa.Table.from_pylist(rows[start:stop], SCORED_SCHEMA)
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=ROWS_PER_GROUP)
    groups = scan_dataset(folder, WANTED)
    assert len(groups) == 13
    wanted = [one for one in rows if one["split"] == "train" and one["correct"]]
    assert len(wanted) == sum(group.num_train for group in groups) == 31
    return groups, {one["example_id"]: one for one in wanted}


def whole(groups):
    return tuple(Slice(group, 0, group.num_train) for group in groups)


def read(window, seed):
    return read_window({"window": [asdict(window)]}, WANTED, seed)


def names_of(tables):
    return [name for table in tables for name in table.column("example_id").to_pylist()]


def assert_rows_of(found, rows):
    """Nothing of a row got into another; columns may be left out."""
    for one in found:
        whole = rows[one["example_id"]]
        assert {**whole, **one} == whole and one["response_ids"] == whole["response_ids"]


def test_rows_of_a_window_are_mixed_and_whole(corpus):
    groups, rows = corpus
    window = Window(0, 0, whole(groups))
    found = read(window, seed=0).to_pylist()
    names = [one["example_id"] for one in found]
    assert_rows_of(found, rows)
    assert sorted(names) == sorted(rows)
    # Neighbours in a file are no neighbors any more, nor do groups stay together.
    numbers = [int(name.removeprefix("row-")) for name in names]
    pairs = list(pairwise(numbers))
    assert sum(0 < second - first < ROWS_PER_GROUP for first, second in pairs) < len(pairs) / 3


def test_how_a_window_is_mixed_depends_on_seed_epoch_and_number(corpus):
    groups, _ = corpus
    first, *others = (
        names_of([read(Window(epoch, number, whole(groups)), seed)])
        for epoch, number, seed in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    )
    assert first == names_of([read(Window(0, 0, whole(groups)), 0)])
    assert len({tuple(first), *map(tuple, others)}) == 4
    assert all(sorted(other) == sorted(first) for other in others)


@settings(max_examples=25, deadline=None)
@given(
    rows_per_window=st.integers(1, 40), seed=st.integers(0, 2**40), position=st.integers(0, 2 * 31)
)
def test_the_rows_are_the_same_from_any_position_on(corpus, rows_per_window, seed, position):
    groups, rows = corpus
    plan = (groups, 2, rows_per_window, seed)
    undisturbed = names_of(read(window, seed) for window in windows(*plan, 0))
    assert sorted(undisturbed[:31]) == sorted(undisturbed[31:]) == sorted(rows)
    taken_up = names_of(read(window, seed) for window in windows(*plan, position))
    assert taken_up == undisturbed[position:]


def test_files_of_other_columns_are_mixed_too(tmp_path):
    """A corpus may be put together from several; what one lacks need not be there."""
    table = pa.Table.from_pylist([row(number, 2) for number in range(3)], SCORED_SCHEMA)
    bare = table.drop_columns(["top_ids", "top_logprobs", "recorded_gap"])
    blank = bare.append_column("recorded_gap", pa.nulls(3))
    for number, one in enumerate((table, bare, blank)):
        pq.write_table(one, tmp_path / f"{number}.parquet")
    found = read(Window(0, 0, whole(scan_dataset(tmp_path, WANTED))), seed=0)
    assert Counter(names_of([found])) == dict.fromkeys(["row-00", "row-01", "row-02"], 3)


def contents(table):
    """What a learner makes of a step's rows, to the byte."""
    arrays = ("token_ids", "trainable", "sampled_logprobs", "coefficients")
    rows = training_sequences(table, 0.1)
    return [(one.origin, *(getattr(one, name).tobytes() for name in arrays)) for one in rows]


def dealt_in_steps(groups, first_step=0, **changes):
    plan = {"num_epochs": 2, "rows_per_step": 7, "rows_per_window": 10, "seed": 3} | changes
    return list(batches(groups, WANTED, **plan, first_step=first_step))


@pytest.fixture(scope="module")
def undisturbed(ray_session, corpus):
    """The steps of a run that nothing breaks off."""
    return dealt_in_steps(corpus[0])


def test_steps_are_of_one_size_and_hold_each_row_once_an_epoch(corpus, undisturbed):
    groups, rows = corpus
    assert [table.num_rows for table in undisturbed] == [7] * 8 + [6]
    names = names_of(undisturbed)
    assert sorted(names[:31]) == sorted(names[31:]) == sorted(rows)
    assert names[:31] != names[31:]
    assert names == names_of(read(window, 3) for window in windows(groups, 2, 10, 3, 0))
    assert_rows_of([one for table in undisturbed for one in table.to_pylist()], rows)


@pytest.mark.parametrize("first_step", [1, 4, 8])
def test_steps_taken_up_are_the_rest_of_the_undisturbed_ones(corpus, undisturbed, first_step):
    """In the first epoch, in the step over its end, and in the last one."""
    taken_up = dealt_in_steps(corpus[0], first_step)
    assert len(taken_up) == 9 - first_step
    for found, expected in zip(taken_up, undisturbed[first_step:], strict=True):
        assert found.equals(expected)
        assert contents(found) == contents(expected)
