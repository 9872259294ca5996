"""Shards of the tokenized corpus: sorting, repeated ids, the probe and what is scored."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.records import TOKENIZED_SCHEMA
from pear_ray.score.shards import (
    LEAKED,
    LOGPROBS_SCHEMA,
    ScoringPlan,
    Shard,
    TokenizedFile,
    cut_shards,
    logprobs_path,
    reject_repeats,
    write_logprobs,
    write_sorted,
)


def row(example_id, **changes):
    good = {
        "example_id": example_id,
        "source": "teacher_plain",
        "scorer": "teacher_plain",
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
    """A row that was rejected before anything of it was known."""
    unknown = ("source", "scorer", "split", "split_is_given", "content")
    nothing = dict.fromkeys(unknown) | {"prompt_ids": [], "response_ids": [], "reason": "bad"}
    return row(example_id, **nothing) | changes


def table_of(rows):
    return pa.Table.from_pylist(rows, TOKENIZED_SCHEMA)


def write(table, folder, rows_per_shard=3):
    """Return the one TokenizedFile that write_sorted makes of a table, and the Parquet file."""
    (folder / "tokenized").mkdir()
    (text,) = write_sorted(table, folder, rows_per_shard).column("file").to_pylist()
    file = TokenizedFile.from_dict(json.loads(text))
    (path,) = (folder / "tokenized").iterdir()
    assert path.name == f"{file.name}.parquet"
    return file, pq.ParquetFile(path)


REPEATED = "example_id: expected unique ids, got {!r} more than once"
ROWS = st.lists(
    st.builds(
        lambda name, digest, scorer: (
            row(name, digest=digest, scorer=scorer, response_ids=[7] * len(scorer) + [1])
            if scorer
            else bad_row(name, digest=digest)
        ),
        st.sampled_from(["a", "a-1", "b", "é", "\0", "Z"]),
        st.sampled_from("0123456789"),
        st.sampled_from(["teacher_plain", "teacher_cipher", "an/other", None]),
    ),
    min_size=1,
    max_size=12,
    # Two rows of one digest are the same row.
    unique_by=lambda one: (one["example_id"], one["digest"]),
)


def slowly_sorted(rows):
    """Rows as write_sorted stores them, the obvious way."""
    expected, seen = [], set()
    for one in sorted(rows, key=lambda r: (r["example_id"], bool(r["reason"]), r["digest"])):
        name = one["example_id"]
        if name in seen and not one["reason"]:
            one = one | {"reason": REPEATED.format(name)}
        seen.add(name)
        expected.append(one)
    return expected


@settings(max_examples=50, deadline=None)
@given(rows=ROWS, rows_per_shard=st.integers(1, 5), data=st.data())
def test_files_do_not_depend_on_the_order_of_rows(rows, rows_per_shard, data):
    shuffled = data.draw(st.permutations(rows))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        file, parquet = write(table_of(rows), Path(one), rows_per_shard)
        assert file == write(table_of(shuffled), Path(other), rows_per_shard)[0]
        (path,), (another,) = Path(one, "tokenized").iterdir(), Path(other, "tokenized").iterdir()
        assert path.read_bytes() == another.read_bytes() and path.name == another.name

        expected = slowly_sorted(rows)
        groups = [expected[n : n + rows_per_shard] for n in range(0, len(rows), rows_per_shard)]
        assert parquet.schema_arrow == TOKENIZED_SCHEMA
        found = [parquet.read_row_group(n).to_pylist() for n in range(parquet.num_row_groups)]
        assert found == groups
    assert file.first_id == expected[0]["example_id"]
    assert file.num_rows == len(rows)
    assert file.num_rejected == sum(bool(one["reason"]) for one in expected)
    num_rows, num_tokens = Counter(), Counter()
    for number, group in enumerate(groups):
        for one in group:
            if not one["reason"]:
                key = file.name, number, one["scorer"]
                num_rows[key] += 1
                num_tokens[key] += len(one["prompt_ids"]) + len(one["response_ids"])
    # In the order of their rows, and within a row group of their scorers.
    assert list(file.shards) == [Shard(*key, num_rows[key], num_tokens[key]) for key in sorted(num_rows)]


def test_chunked_table_is_stored_like_a_contiguous_one(tmp_path):
    rows = [row(name, trainable=[True, False, True]) for name in "dbca"]
    pieces = pa.concat_tables([table_of(rows[:1]), table_of(rows[1:])])
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    file, parquet = write(table_of(rows), tmp_path / "a")
    same, same_parquet = write(pieces, tmp_path / "b")
    assert same == file and same_parquet.read().equals(parquet.read())


def test_empty_block_writes_no_file(tmp_path):
    result = write_sorted(TOKENIZED_SCHEMA.empty_table(), tmp_path, 3)
    assert (result.num_rows, result.schema) == (0, pa.schema([("file", pa.string())]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given_splits", "expected"),
    [((False, False), False), ((False, True), True), ((None, None), False), ((None, True), True)],
)
def test_given_splits_are_noticed(tmp_path, given_splits, expected):
    rows = [row(f"a-{n}", split_is_given=given) for n, given in enumerate(given_splits)]
    assert write(table_of(rows), tmp_path)[0].has_given_splits is expected


def test_file_of_rejected_rows_has_no_shards(tmp_path):
    file, parquet = write(table_of([bad_row("a"), bad_row("b")]), tmp_path)
    assert (file.shards, file.num_rows, file.num_rejected) == ((), 2, 2)
    assert parquet.read().column("reason").to_pylist() == ["bad", "bad"]


def test_first_usable_row_by_digest_wins_among_repeated_ids():
    rows = [
        row("b", digest="9"),
        bad_row("a", digest="0"),
        row("a", digest="7", prompt_ids=[4]),
        row("a", digest="3", prompt_ids=[5]),
        bad_row("a", digest="4", reason="worse"),
    ]
    found = reject_repeats(table_of(rows)).to_pylist()
    assert [(one["example_id"], one["digest"], one["reason"]) for one in found] == [
        ("a", "3", ""),
        ("a", "7", REPEATED.format("a")),
        ("a", "0", "bad"),
        ("a", "4", "worse"),
        ("b", "9", ""),
    ]


def test_shards_are_counted_by_scorer():
    rows = [
        row("a", prompt_ids=[4] * 10),
        row("b", scorer="teacher_cipher"),
        row("c", response_ids=[1]),
        row("d", reason="bad"),
    ]
    found = list(cut_shards(table_of(rows), "file", 7))
    assert found == [Shard("file", 7, "teacher_cipher", 1, 5), Shard("file", 7, "teacher_plain", 2, 16)]


def test_logprobs_have_one_file_per_shard(tmp_path):
    keys = [("f", 0, "teacher_plain"), ("f", 1, "teacher_plain"), ("g", 0, "teacher_plain"), ("f", 0, "../../a:b/c")]
    paths = [logprobs_path(tmp_path, *key) for key in keys]
    assert len(set(paths)) == 4
    (tmp_path / "logprobs").mkdir()
    scored_row = {"row": 3, "logprobs": [-1.0, -0.5], "top_ids": None, "top_logprobs": None}
    for path in paths:
        write_logprobs(path, [scored_row])
    assert sorted((tmp_path / "logprobs").iterdir()) == sorted(paths)
    write_logprobs(paths[0], [scored_row, scored_row])
    assert pq.read_table(paths[0]).schema == LOGPROBS_SCHEMA
    assert pq.read_table(paths[0]).to_pylist() == [scored_row, scored_row]
    assert pq.read_table(paths[3]).to_pylist() == [scored_row]


def test_training_rows_of_a_held_out_prompt_are_rejected():
    rows = [
        row("a", content=1),
        row("b", content=1, split="heldout"),
        row("c", content=2),
        bad_row("d", content=1, split="train"),
        bad_row("e"),
    ]
    plan = ScoringPlan({}, frozenset({1}))
    assert plan.reject_reasons(table_of(rows)) == [LEAKED, "", "", "bad", "bad"]
    assert plan.to_score(table_of(rows)).tolist() == [False, True, True, False, False]
    plan = ScoringPlan({}, frozenset())
    assert plan.reject_reasons(table_of(rows)) == ["", "", "", "bad", "bad"]
    assert plan.to_score(table_of(rows)).tolist() == [True, True, True, False, False]


def test_probe_is_a_share_of_each_scorer_and_depends_on_ids_only():
    rows = [row(f"a-{n}", scorer=("teacher_plain", "teacher_cipher")[n % 2]) for n in range(4000)]
    in_probe = ScoringPlan({"teacher_plain": 0.25, "teacher_cipher": 0.05}, frozenset()).in_probe
    chosen = in_probe(table_of(rows))
    for share, mine in ((0.25, chosen[::2]), (0.05, chosen[1::2])):
        # Four standard deviations of 2000 draws.
        assert abs(mine.sum() - 2000 * share) < 4 * math.sqrt(2000 * share * (1 - share))
    assert in_probe(table_of(rows[::-1])).tolist() == chosen.tolist()[::-1]
    changed = [one | {"recorded_logprobs": [0.0], "content": 1} for one in rows[100:300]]
    assert in_probe(table_of(changed)).tolist() == chosen.tolist()[100:300]
    # A larger probe holds the smaller one.
    larger = ScoringPlan({"teacher_plain": 0.5, "teacher_cipher": 0.5}, frozenset()).in_probe(table_of(rows))
    assert larger[chosen].all()


@pytest.mark.parametrize(("share", "expected"), [(1.0, [True, True, False]), (0.0, [False] * 3)])
def test_probe_of_all_rows_or_none(share, expected):
    rows = [row("a"), row("b"), row("c", scorer="teacher_cipher")]
    found = ScoringPlan({"teacher_plain": share}, frozenset()).in_probe(table_of(rows))
    assert (found.dtype, found.tolist()) == (bool, expected)
    assert not ScoringPlan({"teacher_plain": share}, frozenset()).in_probe(table_of([bad_row("a")])).any()


def test_rows_without_recorded_logprobs_and_probe_rows_are_scored():
    recorded = {"recorded_logprobs": [-1.0, -1.0, -1.0]}
    rows = [
        row("a"),
        row("b", **recorded),
        row("c", scorer="teacher_cipher"),
        row("d", scorer="teacher_cipher", **recorded),
        row("e", content=1),
        row("f", content=1, **recorded),
        bad_row("g"),
    ]
    plan = ScoringPlan({"teacher_cipher": 1.0}, frozenset({1}))
    expected = [True, False, True, True, False, False, False]
    assert plan.to_score(table_of(rows)).tolist() == expected
