"""Merging tokens and log-probs: order, origin, probe, rejected rows and statistics."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_ray.records import SCORED_SCHEMA, TOKENIZED_SCHEMA
from pear_ray.score.merge import MergeLogprobs, ScoreStats
from pear_ray.score.shards import (
    LEAKED,
    ScoringPlan,
    TokenizedFile,
    logprobs_path,
    tokenized_path,
    write_logprobs,
    write_sorted,
)

MODELS = {scorer: f"models/{scorer}" for scorer in ("teacher_plain", "teacher_cipher")}
DIGESTS = ("vocabulary", "template")
NOT_FINITE = "behavior_logprobs: expected finite log-probs, got NaN or infinity from the model of 'teacher_plain'"


def row(example_id, **changes):
    good = {
        "example_id": example_id,
        "source": "teacher_plain",
        "scorer": "teacher_plain",
        "split": "train",
        "split_is_given": False,
        "correct": None,
        "prompt_ids": [4, 5],
        "response_ids": [7, 1],
        "trainable": None,
        "recorded_logprobs": None,
        "truncated": False,
        "content": 0,
        "digest": "0",
        "reason": "",
    }
    return good | changes


@pytest.fixture
def folder(tmp_path):
    for name in ("tokenized", "logprobs", "scored", "rejected", "probe"):
        (tmp_path / name).mkdir()
    return tmp_path


def store(folder, rows, scores, rows_per_shard=2):
    """Write rows as a tokenized file and their `scores` (by example_id); return its name."""
    block = pa.Table.from_pylist(rows, TOKENIZED_SCHEMA)
    text = write_sorted(block, folder, rows_per_shard).column("file")[0].as_py()
    file = TokenizedFile.from_dict(json.loads(text))
    tokenized = pq.ParquetFile(tokenized_path(folder, file.name))
    for shard in file.shards:
        group = tokenized.read_row_group(shard.row_group).to_pylist()
        found = [
            {"row": number, **score_row(scores[one["example_id"]])}
            for number, one in enumerate(group)
            if one["scorer"] == shard.scorer and one["example_id"] in scores
        ]
        if found:
            # Engines score short rows first: positions are in any order.
            write_logprobs(logprobs_path(folder, shard.file, shard.row_group, shard.scorer), found[::-1])
    return file.name


def score_row(logprobs):
    if isinstance(logprobs, dict):
        return logprobs
    return {"logprobs": logprobs, "top_ids": None, "top_logprobs": None}


def merge(folder, rows, scores, fractions=None, leaked=(), number=0):
    """Merge rows; return those that are scored, in the probe and rejected, and the statistics."""
    name = store(folder, rows, scores)
    plan = ScoringPlan(fractions or {}, frozenset(leaked))
    document = MergeLogprobs(folder, plan, MODELS, DIGESTS)({"name": name, "number": number})
    tables = [
        pq.read_table(folder / "scored" / f"part-{number:06d}.parquet"),
        pq.read_table(folder / "probe" / f"{number:06d}.parquet"),
    ]
    assert [table.schema for table in tables] == [SCORED_SCHEMA, SCORED_SCHEMA]
    lines = (folder / "rejected" / f"{number:06d}.jsonl").read_text().splitlines()
    stats = json.loads(document["stats"])
    return *(table.to_pylist() for table in tables), [json.loads(line) for line in lines], stats


def stats_of(*documents):
    stats = ScoreStats()
    for document in documents:
        stats.merge(document)
    return stats


def values(rows, name):
    return [one[name] for one in rows]


def test_scored_row(folder):
    tokenized = row("a", split="heldout", correct=True, trainable=[True, False], truncated=True)
    (found,), probe, rejected, _ = merge(folder, [tokenized], {"a": [-0.5, 0.0]})
    assert (probe, rejected) == ([], [])
    assert found == {
        "example_id": "a",
        "prompt_ids": [4, 5],
        "response_ids": [7, 1],
        "behavior_logprobs": [-0.5, 0.0],
        "behavior_model": "models/teacher_plain",
        "source": "teacher_plain",
        "tokenizer_digest": "vocabulary",
        "template_digest": "template",
        "split": "heldout",
        "correct": True,
        "recorded_gap": None,
        "trainable": [True, False],
        "truncated": True,
        "logprobs_from": "behavior",
        "top_ids": None,
        "top_logprobs": None,
    }


def test_rows_are_sorted_by_id_and_keep_their_logprobs(folder):
    rng = np.random.default_rng(0)
    names = [f"a-{number:02d}" for number in range(23)]
    lengths = rng.integers(1, 9, len(names))
    rows = [
        row(name, response_ids=list(range(length)), scorer=scorer, source=scorer)
        for name, length, scorer in zip(
            names, lengths, ["teacher_plain", "teacher_cipher", "teacher_plain"] * 8, strict=False
        )
    ]
    scores = {name: [-n / 32] * lengths[n] for n, name in enumerate(names)}
    shuffled = [rows[n] for n in rng.permutation(len(rows))]
    found, *_ = merge(folder, shuffled, scores)
    assert values(found, "example_id") == names
    assert values(found, "behavior_logprobs") == [scores[name] for name in names]
    assert values(found, "response_ids") == values(rows, "response_ids")
    models = [f"models/{one['scorer']}" for one in rows]
    assert values(found, "behavior_model") == models


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_row_with_non_finite_logprobs_is_rejected(folder, value):
    rows = [row("a"), row("b", recorded_logprobs=[-1.0, -1.0]), row("c")]
    scores = {"a": [-1.0, -2.0], "b": [-1.0, value], "c": [-3.0, -4.0]}
    found, probe, rejected, document = merge(folder, rows, scores, {"teacher_plain": 1.0})
    assert values(found, "example_id") == values(probe, "example_id") == ["a", "c"]
    assert values(found, "behavior_logprobs") == [[-1.0, -2.0], [-3.0, -4.0]]
    assert rejected == [{"example_id": "b", "reason": NOT_FINITE}]
    assert stats_of(document).num_rejected == 1


def test_rejected_rows_are_listed_in_order_with_reasons(folder):
    nobody = {"source": None, "scorer": None, "split": None, "content": None}
    rows = [
        row("d", content=1),
        row("e", content=1, split="heldout"),
        row("b", reason="worse", prompt_ids=[], response_ids=[]),
        row("a", **nobody, reason="b\u00e4d\n", prompt_ids=[], response_ids=[]),
        row("c"),
    ]
    scores = {"c": [-1.0, -2.0], "d": [-9.0, -9.0], "e": [-3.0, -4.0]}
    found, probe, rejected, document = merge(folder, rows, scores, {"teacher_plain": 1.0}, [1])
    assert values(found, "example_id") == values(probe, "example_id") == ["c", "e"]
    assert rejected == [
        {"example_id": "a", "reason": "b\u00e4d\n"},
        {"example_id": "b", "reason": "worse"},
        {"example_id": "d", "reason": LEAKED},
    ]
    assert stats_of(document).num_rejected == 3
    assert stats_of(document).by_source()["teacher_plain"]["rows"] == 2


def test_file_of_rejected_rows_is_empty(folder):
    rows = [row(name, scorer=None, source=None, reason="bad") for name in "abc"]
    found, probe, rejected, document = merge(folder, rows, {}, {"teacher_plain": 1.0})
    assert (found, probe) == ([], [])
    assert values(rejected, "example_id") == ["a", "b", "c"]
    assert stats_of(document).by_source() == {}


def test_recorded_logprobs_are_used_for_rows_that_were_not_scored(folder):
    rows = [row("a", recorded_logprobs=[-0.25, -0.5]), row("b"), row("c", source="web")]
    found, *_ = merge(folder, rows, {"b": [-1.0, -2.0], "c": [-3.0, -4.0]})
    assert values(found, "behavior_logprobs") == [[-0.25, -0.5], [-1.0, -2.0], [-3.0, -4.0]]
    assert values(found, "logprobs_from") == ["recorded", "behavior", "reference"]
    assert values(found, "recorded_gap") == [None, None, None]
    # The source of a row stays, whichever model scored it.
    assert values(found, "source") == ["teacher_plain", "teacher_plain", "web"]
    assert values(found, "behavior_model") == ["models/teacher_plain"] * 3


def test_shard_of_recorded_rows_needs_no_scores(folder):
    rows = [row(name, recorded_logprobs=[-0.25, -0.5]) for name in "abc"]
    found, *_ = merge(folder, rows, {})
    assert not list((folder / "logprobs").iterdir())
    assert values(found, "logprobs_from") == ["recorded"] * 3


def test_probe_row_keeps_computed_logprobs_and_recorded_gap(folder):
    recorded = {"recorded_logprobs": [-1.0, -2.0]}
    rows = [row("a", **recorded), row("b", source="teacher_cipher", scorer="teacher_cipher", **recorded), row("c")]
    scores = {"a": [-1.125, -1.5], "c": [-3.0, -4.0]}
    found, probe, _, document = merge(folder, rows, scores, {"teacher_plain": 1.0})
    assert probe == [found[0], found[2]]
    assert values(found, "behavior_logprobs") == [[-1.125, -1.5], [-1.0, -2.0], [-3.0, -4.0]]
    assert values(found, "logprobs_from") == ["behavior", "recorded", "behavior"]
    assert values(found, "recorded_gap") == [0.5, None, None]
    by_source = stats_of(document).by_source()
    assert by_source["teacher_plain"]["recorded_gap_max"] == 0.5
    assert by_source["teacher_plain"]["recorded_gap_mean"] == (0.125 + 0.5) / 2
    assert by_source["teacher_cipher"]["recorded_gap_max"] is None
    assert by_source["teacher_cipher"]["recorded_gap_mean"] is None


def test_probe_holds_the_rows_of_the_plan(folder):
    rows = [row(f"a-{number:03d}") for number in range(100)]
    chosen = ScoringPlan({"teacher_plain": 0.3}, frozenset()).in_probe(pa.Table.from_pylist(rows, TOKENIZED_SCHEMA))
    scores = {one["example_id"]: [-1.0, -1.0] for one in rows}
    found, probe, *_ = merge(folder, rows, scores, {"teacher_plain": 0.3})
    assert 10 < len(probe) < 60
    assert probe == [one for one, is_in in zip(found, chosen, strict=True) if is_in]


def test_top_k_stays_with_its_row(folder):
    top = {
        name: {"logprobs": [-1.0, -2.0], "top_ids": [n, n + 1, n + 2, n + 3], "top_logprobs": [-0.5, -1.0, -0.25, -n]}
        for n, name in enumerate("ac", start=2)
    }
    rows = [row("a"), row("b", recorded_logprobs=[-0.25, -0.5]), row("c")]
    found, *_ = merge(folder, rows, top)
    assert values(found, "top_ids") == [[2, 3, 4, 5], None, [3, 4, 5, 6]]
    assert values(found, "top_logprobs") == [[-0.5, -1, -0.25, -2], None, [-0.5, -1, -0.25, -3]]


@pytest.mark.parametrize("scores", [{}, {"a": [-1.0, -1.0]}])
def test_row_without_logprobs_is_an_internal_error(folder, scores):
    rows = [row("a"), row("b")]
    name = store(folder, rows, scores)
    merger = MergeLogprobs(folder, ScoringPlan({}, frozenset()), MODELS, DIGESTS)
    message = f"{name}: row {len(scores)} of row group 0 was never scored"
    with pytest.raises(RuntimeError, match=message):
        merger({"name": name, "number": 0})


def test_stats_are_merged_over_files(folder):
    recorded = {"recorded_logprobs": [-1.0, -2.0]}
    first = [
        row("a", **recorded),
        row("b", truncated=True),
        row("c", source="web", response_ids=[1]),
        row("d", reason="bad"),
    ]
    second = [row("e", **recorded), row("f", source="teacher_cipher", scorer="teacher_cipher"), row("g", **recorded)]
    one = merge(folder, first, {"a": [-1.5, -2.0], "b": [-1.0, -1.0], "c": [-1.0]}, {"teacher_plain": 1.0})
    other = merge(folder, second, {"e": [-1.0, -2.25], "f": [-1.0, -1.0]}, {"teacher_plain": 0.0}, number=1)
    expected = {
        "teacher_cipher": {
            "rows": 1,
            "response_tokens": 2,
            "truncated": 0,
            "from_behavior": 1,
            "recorded_gap_mean": None,
            "recorded_gap_max": None,
        },
        "teacher_plain": {
            "rows": 4,
            "response_tokens": 8,
            "truncated": 1,
            "from_behavior": 3,
            "from_recorded": 1,
            "recorded_gap_mean": (0.5 + 0 + 0 + 0.25) / 4,
            "recorded_gap_max": 0.5,
        },
        "web": {
            "rows": 1,
            "response_tokens": 1,
            "truncated": 0,
            "from_reference": 1,
            "recorded_gap_mean": None,
            "recorded_gap_max": None,
        },
    }
    for documents in ((one[-1], other[-1]), (other[-1], one[-1])):
        stats = stats_of(*documents)
        assert stats.num_rejected == 1
        assert stats.by_source() == expected
        # Merged statistics can be merged again.
        assert stats_of(json.loads(json.dumps(vars(stats)))).by_source() == expected


def test_repeated_merge_writes_the_same_bytes(folder):
    rows = [row(name, recorded_logprobs=[-1.0, -2.0]) for name in "abcd"]
    name = store(folder, rows, {"b": [-1.0, -2.5]})
    merger = MergeLogprobs(folder, ScoringPlan({"teacher_plain": 0.5}, frozenset()), MODELS, DIGESTS)
    written = []
    for _ in range(2):
        document = merger({"name": name, "number": 0})
        files = sorted(folder.rglob("*000000.*"))
        assert len(files) == 3
        written.append([document, *(path.read_bytes() for path in files)])
    assert written[0] == written[1]
