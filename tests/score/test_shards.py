"""The tokenized corpus in parts: sorted, without repeats, and which rows of it are scored."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.records import TOKENIZED_SCHEMA
from pear_ray.score.shards import (
    LOGPROBS_SCHEMA,
    ScoringPlan,
    Shard,
    arrays,
    logprobs_file,
    parts_of,
    without_repeats,
    write_logprobs,
    write_sorted,
)


def row(example_id, **changes):
    good = {
        "example_id": example_id,
        "source": "tutor",
        "scorer": "tutor",
        "split": "train",
        "split_is_given": False,
        "correct": None,
        "prompt_ids": [4, 5],
        "response_ids": [7, 8, 1],
        "trainable": None,
        "recorded_logprobs": None,
        "truncated": False,
        "content": 0,
        "digest": "0",
        "reason": "",
    }
    return good | changes


def bad_row(example_id, **changes):
    """A row that was refused before anything of it was known."""
    unknown = ("source", "scorer", "split", "split_is_given", "content")
    nothing = dict.fromkeys(unknown) | {"prompt_ids": [], "response_ids": [], "reason": "bad"}
    return row(example_id, **nothing) | changes


def table_of(rows):
    return pa.Table.from_pylist(rows, TOKENIZED_SCHEMA)


def written(rows, folder, rows_per_part=3):
    """What write_sorted says of the one file it wrote, and that file."""
    (facts,) = write_sorted(table_of(rows), folder, rows_per_part).column("facts").to_pylist()
    assert [path.name for path in folder.iterdir()] == [f"{json.loads(facts)['file']}.parquet"]
    return json.loads(facts), pq.ParquetFile(next(folder.iterdir()))


ROWS = st.lists(
    st.builds(
        lambda name, digest, scorer: (
            row(name, digest=digest, scorer=scorer, response_ids=[7] * len(scorer) + [1])
            if scorer
            else bad_row(name, digest=digest)
        ),
        st.sampled_from(["a", "a-1", "b", "é", "\0", "Z"]),
        st.sampled_from("0123456789"),
        st.sampled_from(["tutor", "coder", "an/other", None]),
    ),
    min_size=1,
    max_size=12,
    # Two rows of one digest are the same row.
    unique_by=lambda one: (one["example_id"], one["digest"]),
)


def in_order(rows):
    """Rows as they are to be stored, the obvious way."""
    expected, seen = [], set()
    for one in sorted(rows, key=lambda r: (r["example_id"], bool(r["reason"]), r["digest"])):
        name = one["example_id"]
        if name in seen and not one["reason"]:
            reason = f"example_id: read {name!r} more than once; expected a name of its own for"
            one = one | {"reason": f"{reason} each row"}
        seen.add(name)
        expected.append(one)
    return expected


@settings(max_examples=50, deadline=None)
@given(rows=ROWS, rows_per_part=st.integers(1, 5), data=st.data())
def test_rows_are_stored_alike_in_whatever_order_they_come(rows, rows_per_part, data):
    shuffled = data.draw(st.permutations(rows))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        facts, file = written(rows, Path(one), rows_per_part)
        assert facts == written(shuffled, Path(other), rows_per_part)[0]
        (path,), (another,) = Path(one).iterdir(), Path(other).iterdir()
        assert path.read_bytes() == another.read_bytes() and path.name == another.name

        expected = in_order(rows)
        groups = [expected[n : n + rows_per_part] for n in range(0, len(rows), rows_per_part)]
        assert file.schema_arrow == TOKENIZED_SCHEMA
        found = [file.read_row_group(n).to_pylist() for n in range(file.num_row_groups)]
        assert found == groups
    assert facts["first_id"] == expected[0]["example_id"]
    assert facts["num_rows"] == len(rows)
    assert facts["num_rejected"] == sum(bool(one["reason"]) for one in expected)
    counted = Counter()
    for number, group in enumerate(groups):
        for one in group:
            if not one["reason"]:
                key = facts["file"], number, one["scorer"]
                num_tokens = len(one["prompt_ids"]) + len(one["response_ids"])
                counted.update({(key, "rows"): 1, (key, "tokens"): num_tokens})
    parts = [Shard(**part) for part in facts["parts"]]
    assert {(part.key, "rows"): part.num_rows for part in parts} | {
        (part.key, "tokens"): part.num_tokens for part in parts
    } == counted
    # Parts come in the order of their rows, and so do the scorers of each group.
    assert [part.key for part in parts] == sorted(part.key for part in parts)


def test_rows_in_pieces_are_stored_as_rows_in_one(tmp_path):
    rows = [row(name, trainable=[True, False, True]) for name in "dbca"]
    pieces = pa.concat_tables([table_of(rows[:1]), table_of(rows[1:])])
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    facts, file = written(rows, tmp_path / "a")
    told = write_sorted(pieces, tmp_path / "b", 3).column("facts").to_pylist()
    assert [json.loads(text) for text in told] == [facts]
    assert pq.read_table(tmp_path / "b").equals(file.read())


def test_no_rows_are_stored_nowhere(tmp_path):
    told = write_sorted(TOKENIZED_SCHEMA.empty_table(), tmp_path, 3)
    assert (told.num_rows, told.schema) == (0, pa.schema([("facts", pa.string())]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given_splits", "expected"),
    [((False, False), False), ((False, True), True), ((None, None), False), ((None, True), True)],
)
def test_it_is_told_whether_any_split_was_given(tmp_path, given_splits, expected):
    rows = [row(f"a-{n}", split_is_given=given) for n, given in enumerate(given_splits)]
    assert written(rows, tmp_path)[0]["splits_are_given"] is expected


def test_a_file_of_unusable_rows_has_no_parts(tmp_path):
    facts, file = written([bad_row("a"), bad_row("b")], tmp_path)
    assert (facts["parts"], facts["num_rows"], facts["num_rejected"]) == ([], 2, 2)
    assert file.read().column("reason").to_pylist() == ["bad", "bad"]


def test_of_rows_with_one_name_the_first_usable_one_by_content_is_kept():
    rows = [
        row("b", digest="9"),
        bad_row("a", digest="0"),
        row("a", digest="7", prompt_ids=[4]),
        row("a", digest="3", prompt_ids=[5]),
        bad_row("a", digest="4", reason="worse"),
    ]
    found = without_repeats(table_of(rows)).to_pylist()
    repeated = "example_id: read 'a' more than once; expected a name of its own for each row"
    assert [(one["example_id"], one["digest"], one["reason"]) for one in found] == [
        ("a", "3", ""),
        ("a", "7", repeated),
        ("a", "0", "bad"),
        ("a", "4", "worse"),
        ("b", "9", ""),
    ]


def test_parts_of_rows_are_counted_by_scorer():
    rows = [
        row("a", prompt_ids=[4] * 10),
        row("b", scorer="coder"),
        row("c", response_ids=[1]),
        row("d", reason="bad"),
    ]
    found = list(parts_of(table_of(rows), "file", 7))
    assert found == [Shard("file", 7, "coder", 1, 5), Shard("file", 7, "tutor", 2, 16)]
    assert asdict(found[0])["row_group"] == 7


def test_logprobs_are_stored_whole_under_a_name_of_their_own(tmp_path):
    keys = [("f", 0, "tutor"), ("f", 1, "tutor"), ("g", 0, "tutor"), ("f", 0, "../../a:b/c")]
    paths = [logprobs_file(tmp_path, *key) for key in keys]
    assert len(set(paths)) == 4
    (tmp_path / "logprobs").mkdir()
    answer = {"row": 3, "logprobs": [-1.0, -0.5], "top_ids": None, "top_logprobs": None}
    for path in paths:
        write_logprobs(path, [answer])
    assert sorted((tmp_path / "logprobs").iterdir()) == sorted(paths)
    write_logprobs(paths[0], [answer, answer])
    assert pq.read_table(paths[0]).schema == LOGPROBS_SCHEMA
    assert pq.read_table(paths[0]).to_pylist() == [answer, answer]
    assert pq.read_table(paths[3]).to_pylist() == [answer]


def test_a_prompt_that_is_held_out_elsewhere_is_not_trained_on():
    rows = [
        row("a", content=1),
        row("b", content=1, split="heldout"),
        row("c", content=2),
        bad_row("d", content=1, split="train"),
        bad_row("e"),
    ]
    leak = "split: read 'train'; expected 'heldout', as rows of this prompt are"
    selection = ScoringPlan({}, frozenset({1}))
    assert selection.reasons(table_of(rows)) == [leak, "", "", "bad", "bad"]
    assert selection.usable(table_of(rows)).tolist() == [False, True, True, False, False]
    without = ScoringPlan({}, frozenset())
    assert without.reasons(table_of(rows)) == ["", "", "", "bad", "bad"]
    assert without.usable(table_of(rows)).tolist() == [True, True, True, False, False]


def test_the_probe_takes_about_its_share_of_each_scorer_whatever_else_there_is():
    rows = [row(f"a-{n}", scorer=("tutor", "coder")[n % 2]) for n in range(4000)]
    probed = ScoringPlan({"tutor": 0.25, "coder": 0.05}, frozenset()).probed
    chosen = probed(table_of(rows))
    for share, mine in ((0.25, chosen[::2]), (0.05, chosen[1::2])):
        # Four standard deviations of 2000 draws.
        assert abs(mine.sum() - 2000 * share) < 4 * math.sqrt(2000 * share * (1 - share))
    assert probed(table_of(rows[::-1])).tolist() == chosen.tolist()[::-1]
    changed = [one | {"recorded_logprobs": [0.0], "content": 1} for one in rows[100:300]]
    assert probed(table_of(changed)).tolist() == chosen.tolist()[100:300]
    # A larger probe holds the smaller one.
    larger = ScoringPlan({"tutor": 0.5, "coder": 0.5}, frozenset()).probed(table_of(rows))
    assert larger[chosen].all()


@pytest.mark.parametrize(("share", "expected"), [(1.0, [True, True, False]), (0.0, [False] * 3)])
def test_the_probe_is_of_all_rows_or_none_where_it_is_to_be(share, expected):
    rows = [row("a"), row("b"), row("c", scorer="coder")]
    found = ScoringPlan({"tutor": share}, frozenset()).probed(table_of(rows))
    assert (found.dtype, found.tolist()) == (bool, expected)
    assert not ScoringPlan({"tutor": share}, frozenset()).probed(table_of([bad_row("a")])).any()


def test_rows_are_scored_that_bring_no_logprobs_or_are_of_the_probe():
    recorded = {"recorded_logprobs": [-1.0, -1.0, -1.0]}
    rows = [
        row("a"),
        row("b", **recorded),
        row("c", scorer="coder"),
        row("d", scorer="coder", **recorded),
        row("e", content=1),
        row("f", content=1, **recorded),
        bad_row("g"),
    ]
    selection = ScoringPlan({"coder": 1.0}, frozenset({1}))
    expected = [True, False, True, True, False, False, False]
    assert selection.scored(table_of(rows)).tolist() == expected


OF_FLOATS = pa.list_(pa.float32())


@given(
    pieces=st.lists(st.lists(st.none() | st.lists(st.integers(-9, 9).map(float), max_size=3))),
    start=st.integers(0, 5),
    length=st.integers(0, 9),
)
def test_lists_of_a_column_are_arrays_whatever_its_pieces(pieces, start, length):
    column = pa.chunked_array([pa.array(piece, OF_FLOATS) for piece in pieces], OF_FLOATS)
    column = column.slice(start, length)
    found = arrays(column)
    assert [None if one is None else one.tolist() for one in found] == column.to_pylist()
    assert all(one.dtype == np.float32 for one in found if one is not None)


def test_lists_of_any_kind_are_arrays():
    # Also where the pieces themselves are parts of others.
    flags = pa.array([[True], None, [False, True], []], pa.list_(pa.bool_()))
    found = arrays(pa.chunked_array([flags[1:3], flags[3:]]))
    assert [None if one is None else one.tolist() for one in found] == [None, [False, True], []]
    # A list that is not there may lie on values all the same.
    values = pa.array([1, 2, 3, 4], pa.int32())
    hidden = pa.ListArray.from_arrays([0, 1, 3, 4], values, mask=pa.array([False, True, False]))
    found = arrays(pa.chunked_array([hidden]))
    assert [None if one is None else one.tolist() for one in found] == [[1], None, [4]]
    (found,) = arrays(pa.chunked_array([pa.array([[math.nan, -math.inf]], OF_FLOATS)]))
    assert np.isnan(found[0]) and found[1] == -math.inf
