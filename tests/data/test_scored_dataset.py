"""The scored dataset: row groups counted, rows selected, training sequences built."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.config import Job
from pear_ray.data.scored_dataset import (
    OPTIONAL_COLUMNS,
    RowFilter,
    RowGroup,
    first_rows,
    list_extremes,
    list_lengths,
    read_row_group,
    scan_dataset,
    training_sequences,
)
from pear_ray.data.tokenizer import load_tokenizer, tokenizer_digests
from pear_ray.errors import ConfigError
from pear_ray.losses.packing import pack
from tests.data.scored_rows import GOOD, WANTED, of_length, row, stored, table_of

FLOATS, INTS = pa.list_(pa.float32()), pa.list_(pa.int32())


def names_of(table):
    return table.column("example_id").to_pylist()


GOOD_ROWS = {
    "as long as a micro-batch": of_length(3, 5),
    "of one token each": of_length(1, 1),
    "the smallest and the largest id": {"prompt_ids": [0, 99], "response_ids": [99, 0, 99]},
    "certain tokens, rounded": {"behavior_logprobs": [0.0, -0.0, 0.0005]},
    "an unlikely token": {"behavior_logprobs": [-1e30, -1.0, -1.0]},
    "tokens of others in between": {"trainable": [True, False, True], "behavior_logprobs": [-1.0, 0.0, -1.0]},
}


@pytest.mark.parametrize("changes", GOOD_ROWS.values(), ids=GOOD_ROWS)
def test_rows_within_the_bounds_are_accepted(tmp_path, changes):
    (group,) = scan_dataset(stored(tmp_path, table_of(row("a", **changes))), WANTED)
    assert (group.num_train, group.num_heldout) == (1, 0)


def blank(name):
    """A good table with a column of nulls without a type."""
    return GOOD.set_column(GOOD.schema.get_field_index(name), name, pa.nulls(3))


OTHER_COLUMNS = {
    "no optional columns": GOOD.drop_columns(sorted(OPTIONAL_COLUMNS)),
    "extra columns": GOOD.append_column("note", pa.array(["new"] * 3)),
    "another order": GOOD.select(sorted(GOOD.column_names)),
    **{f"null {name}": blank(name) for name in sorted(OPTIONAL_COLUMNS | {"correct"})},
}


@pytest.mark.parametrize("table", OTHER_COLUMNS.values(), ids=OTHER_COLUMNS)
def test_optional_extra_and_reordered_columns_are_accepted(tmp_path, table):
    (group,) = scan_dataset(stored(tmp_path, table, rows_per_group=3), WANTED)
    assert group == RowGroup(str(tmp_path / "0.parquet"), 0, 2, 1, ("teacher_plain",))
    found = training_sequences(read_row_group(group, WANTED, "train"), 0.1)
    assert [one.token_ids.tolist() for one in found] == [[4, 5, 7, 8, 1]] * 2
    assert [one.coefficients.tolist() for one in found] == [[0.0, 0.0, 1.0, 1.0, 1.0]] * 2


@pytest.mark.parametrize("table", OTHER_COLUMNS.values(), ids=OTHER_COLUMNS)
def test_files_of_one_dataset_may_differ_in_columns(tmp_path, table):
    groups = scan_dataset(stored(tmp_path, GOOD, table, rows_per_group=3), WANTED)
    found = first_rows(groups, WANTED, "train", 4)
    assert names_of(found) == [*"abab"]
    assert [len(one.token_ids) for one in training_sequences(found, 0.1)] == [5] * 4


def test_row_groups_are_counted_in_file_order(tmp_path):
    first = table_of(row("a"), row("b", source="web"), row("c", split="heldout", source="teacher_cipher"), row("d"))
    second = table_of(row("e", split="heldout", source="web"))
    groups = scan_dataset(stored(tmp_path, first, GOOD.slice(0, 0), second), WANTED)
    one, other = str(tmp_path / "0.parquet"), str(tmp_path / "2.parquet")
    assert [group for group in groups if group.file in (one, other)] == [
        RowGroup(one, 0, 2, 0, ("teacher_plain", "web")),
        RowGroup(one, 1, 1, 1, ("teacher_cipher", "teacher_plain")),
        RowGroup(other, 0, 0, 1, ("web",)),
    ]
    assert sum(group.num_train + group.num_heldout for group in groups) == 5


def test_top_k_is_found_behind_an_empty_file(tmp_path):
    """Stage `score` writes one if it rejects all rows of a file."""
    groups = scan_dataset(stored(tmp_path, GOOD.slice(0, 0), GOOD), replace(WANTED, top_logprobs=True))
    assert sum(group.num_train for group in groups) == 2


some_rows = st.lists(
    st.tuples(
        st.sampled_from(["train", "heldout"]),
        st.sampled_from([True, False, None]),
        st.sampled_from(["teacher_plain", "teacher_cipher", "web"]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=10, deadline=None)
@given(files=st.lists(some_rows, min_size=1, max_size=3), per_group=st.integers(1, 5))
def test_row_groups_hold_the_selected_rows(files, per_group):
    rows = [
        [row(f"{f}-{n}", split=s, correct=c, source=o) for n, (s, c, o) in enumerate(file)]
        for f, file in enumerate(files)
    ]
    cut = [file[n : n + per_group] for file in rows for n in range(0, len(file), per_group)]
    with tempfile.TemporaryDirectory() as name:
        folder = stored(Path(name), *(table_of(*file) for file in rows), rows_per_group=per_group)
        authors = {one["source"] for file in rows for one in file}
        for negatives, sources in ((False, ()), (True, ()), (True, (min(authors),))):
            wanted = replace(WANTED, negatives=negatives, sources=sources)
            groups = scan_dataset(folder, wanted)
            assert len(groups) == len(cut)
            for group, own in zip(groups, cut, strict=True):
                assert group.sources == tuple(sorted({one["source"] for one in own}))
                own = [one for one in own if one["source"] in (sources or authors)]
                right = [one for one in own if one["correct"] is not False]
                train = [one for one in (own if negatives else right) if one["split"] == "train"]
                heldout = [one for one in right if one["split"] == "heldout"]
                assert (group.num_train, group.num_heldout) == (len(train), len(heldout))
                for split, chosen in (("train", train), ("heldout", heldout)):
                    found = names_of(read_row_group(group, wanted, split))
                    assert found == [one["example_id"] for one in chosen]


def test_unknown_source_is_rejected(tmp_path):
    stored(tmp_path, table_of(row("a"), row("b", source="teacher_cipher")))
    expected = r"sft\.sources: expected among \['teacher_cipher', 'teacher_plain'\] .*, got \['tuto'\]"
    with pytest.raises(ConfigError, match=expected):
        scan_dataset(tmp_path, replace(WANTED, sources=("teacher_cipher", "tuto")))


@pytest.mark.parametrize(("negatives", "expected"), [(False, "ac"), (True, "abc")])
def test_negatives_are_trained_on_only_if_selected(tmp_path, negatives, expected):
    wanted = replace(WANTED, negatives=negatives)
    rows = [row("a", correct=True), row("b", correct=False), row("c")]
    held = [{**one, "example_id": f"{one['example_id']}-h", "split": "heldout"} for one in rows]
    groups = scan_dataset(stored(tmp_path, table_of(*rows, *held), rows_per_group=6), wanted)
    for split, names in (("train", [*expected]), ("heldout", ["a-h", "c-h"])):
        assert names_of(first_rows(groups, wanted, split, 9)) == names


some_floats = st.none() | st.lists(st.sampled_from([-2.0, -0.5, 0.0, 3.0, math.nan]), max_size=4)
some_ids = st.none() | st.lists(st.integers(-3, 2**31 - 1), max_size=4)


def slow_extremes(values):
    values = values or [0.0]
    return (math.nan,) * 2 if any(map(math.isnan, values)) else (min(values), max(values))


@pytest.mark.parametrize(("kind", "lists"), [(FLOATS, some_floats), (INTS, some_ids)], ids=str)
@settings(deadline=None)
@given(data=st.data(), start=st.integers(0, 5), length=st.integers(0, 9))
def test_list_extremes_match_a_plain_loop(kind, lists, data, start, length):
    pieces = data.draw(st.lists(st.lists(lists, max_size=4), max_size=4))
    column = pa.chunked_array([pa.array(piece, kind) for piece in pieces], kind)
    column = column.slice(start, length)
    expected = np.array([slow_extremes(values) for values in column.to_pylist()]).reshape(-1, 2)
    low, high = list_extremes(column)
    assert low.dtype == high.dtype == np.float64
    np.testing.assert_array_equal(np.stack([low, high], axis=1), expected)
    assert list_lengths(column).tolist() == [len(values or []) for values in column.to_pylist()]


def test_values_under_a_null_list_are_ignored():
    values = pa.array([-1.0, math.nan, -3.0, -4.0], pa.float32())
    hidden = pa.ListArray.from_arrays([0, 1, 2, 4], values, mask=pa.array([False, True, False]))
    column = pa.chunked_array([hidden])
    assert list_lengths(column).tolist() == [1, 0, 2]
    assert [found.tolist() for found in list_extremes(column)] == [[-1.0, 0.0, -4.0], [-1.0, 0.0, -3.0]]


def sequence_of(**changes):
    (sequence,) = training_sequences(table_of(row("a", **changes)), 0.1, teacher=True)
    return sequence


def test_prompt_of_a_sequence_is_not_trainable():
    sequence = sequence_of(source="teacher_cipher")
    found = {name: getattr(sequence, name) for name in ("token_ids", "trainable")}
    assert {name: array.tolist() for name, array in found.items()} == {
        "token_ids": [4, 5, 7, 8, 1],
        "trainable": [False, False, True, True, True],
    }
    assert sequence.sampled_logprobs.tolist() == [0.0, 0.0, -0.5, -1.0, -0.25]
    assert sequence.coefficients.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert sequence.origin == "teacher_cipher"
    assert sequence.teacher_ids.tolist() == [[0, 0], [0, 0], [7, 9], [8, 3], [1, 2]]
    expected = [[0, 0], [0, 0], [-0.5, -1.0], [-1.0, -2.0], [-0.25, -3.0]]
    assert sequence.teacher_logprobs.tolist() == expected


@pytest.mark.parametrize(
    "changes",
    [{}, {"correct": False}, {"trainable": [True, False, True]}, of_length(1, 1)],
    ids=["good", "wrong", "of two turns", "of one token"],
)
def test_dtypes_of_a_sequence(changes):
    sequence = sequence_of(**changes)
    assert sequence.token_ids.dtype == sequence.teacher_ids.dtype == np.int64
    assert sequence.trainable.dtype == bool
    floats = (sequence.sampled_logprobs, sequence.coefficients, sequence.teacher_logprobs)
    assert [array.dtype for array in floats] == [np.float32] * 3


@pytest.mark.parametrize(("correct", "expected"), [(True, 1.0), (None, 1.0), (False, -0.25)])
@pytest.mark.parametrize("trainable", [None, [True, False, True], [False] * 3])
def test_coefficients_are_zero_outside_trainable_tokens(correct, expected, trainable):
    table = table_of(row("a", correct=correct, trainable=trainable))
    (sequence,) = training_sequences(table, 0.25)
    mask = [False, False, *(trainable or [True] * 3)]
    assert sequence.trainable.tolist() == mask
    assert sequence.coefficients.tolist() == [expected if is_trainable else 0.0 for is_trainable in mask]


def test_table_without_optional_columns_has_no_teacher():
    (sequence,) = training_sequences(GOOD.slice(1, 1).drop_columns(sorted(OPTIONAL_COLUMNS)), 0.1)
    assert sequence.trainable.tolist() == [False, False, True, True, True]
    assert sequence.teacher_ids is None and sequence.teacher_logprobs is None


def test_teacher_is_attached_only_on_request():
    for sequence in training_sequences(GOOD, 0.1):
        assert sequence.teacher_ids is None and sequence.teacher_logprobs is None


def test_sequences_of_a_sliced_table():
    rows = [
        row(str(n), prompt_ids=[n] * (1 + n % 3), trainable=None if n % 2 else [True, False, True]) for n in range(9)
    ]
    whole = training_sequences(table_of(*rows), 0.1)
    pieces = pa.concat_tables([table_of(*rows[:4]), table_of(*rows[4:])]).slice(2, 5)
    for found, expected in zip(training_sequences(pieces, 0.1), whole[2:7], strict=True):
        for name in ("token_ids", "trainable", "sampled_logprobs", "coefficients"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()


def test_rows_with_and_without_top_logprobs_are_packed_together(tmp_path):
    """Rows with recorded log-probs have no top-k; without distillation it is not needed."""
    bare = {"top_ids": None, "top_logprobs": None}
    folder = stored(tmp_path, table_of(row("a"), row("b", **bare)), table_of(row("c", **bare)))
    table = first_rows(scan_dataset(folder, WANTED), WANTED, "train", 3)
    for order in ([0, 1, 2], [2, 1, 0]):
        ((batch,),) = pack(training_sequences(table.take(order), 0.1), 1, 16)
        assert batch.trainable_T.sum() == 9


def test_first_rows_read_as_few_groups_as_possible(tmp_path):
    rows = [row(name, split="heldout" if name in "cd" else "train") for name in "abcdefg"]
    groups = scan_dataset(stored(tmp_path, table_of(*rows)), WANTED)
    gone = RowGroup(str(tmp_path / "nowhere.parquet"), 0, 5, 5, ("teacher_plain",))
    for most, names in ((1, "a"), (2, "ab"), (3, "abe"), (4, "abef")):
        table = first_rows([*groups[:3], gone], WANTED, "train", most)
        assert names_of(table) == [*names]
    assert names_of(first_rows(groups, WANTED, "train", 99)) == [*"abefg"]
    # Groups without a row of the split are not read.
    unread = [replace(gone, num_heldout=0), groups[1]]
    assert names_of(first_rows(unread, WANTED, "heldout", 9)) == ["c", "d"]


def test_first_rows_of_an_empty_split_are_none(tmp_path):
    groups = scan_dataset(stored(tmp_path, table_of(row("a"))), WANTED)
    assert first_rows(groups, WANTED, "heldout", 3) is None
    assert first_rows([], WANTED, "train", 3) is None


@pytest.mark.parametrize(
    ("sft", "negatives", "top_logprobs"),
    [
        ({}, False, False),
        ({"negatives": True}, True, False),
        ({"objective": "kl", "sources": ["teacher_plain"]}, False, True),
    ],
    ids=["nll", "negatives", "kl of one source"],
)
def test_row_filter_follows_the_job(tiny_model, sft, negatives, top_logprobs):
    path = str(tiny_model(True))
    job = Job.model_validate(
        {
            "run": {"dir": "run"},
            "model": {"path": path},
            "generator": {"max_new_tokens": 8, "max_model_len": 16},
            "learner": {"tokens_per_micro_batch": 16, "sequence_parallel": 2},
            "tasks": [{"name": "countdown"}],
            "corpus": {"top_logprobs": 2},
            "sft": sft,
        }
    )
    # 128 embedding rows, padded from the tokenizer's 100 words.
    sources = tuple(sft.get("sources", ()))
    expected = RowFilter(tokenizer_digests(load_tokenizer(path)), 128, 32, negatives, top_logprobs, sources)
    assert RowFilter.from_job(job) == expected
