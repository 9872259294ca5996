"""Tokens and log-probs put together: order, origin, probe, rejected rows and figures."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_ray.records import SCORED_SCHEMA, TOKENIZED_SCHEMA
from pear_ray.score.merge import MergeLogprobs, ScoreStats
from pear_ray.score.shards import ScoringPlan, logprobs_file, write_logprobs, write_sorted

FACTS = {
    scorer: {
        "behavior_model": f"models/{scorer}",
        "tokenizer_digest": "vocabulary",
        "template_digest": "template",
    }
    for scorer in ("tutor", "coder")
}
NOT_FINITE = (
    "behavior_logprobs: the model of 'tutor' gave a NaN or infinity; expected finite log-probs"
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


def stored(folder, rows, answers, rows_per_part=2):
    """Name of the file of these rows, whose `answers` (by example_id) are stored part by part."""
    block = pa.Table.from_pylist(rows, TOKENIZED_SCHEMA)
    told = write_sorted(block, folder / "tokenized", rows_per_part)
    facts = json.loads(told.column("facts")[0].as_py())
    tokenized = pq.ParquetFile(folder / "tokenized" / f"{facts['file']}.parquet")
    for part in facts["parts"]:
        group = tokenized.read_row_group(part["row_group"]).to_pylist()
        found = [
            {"row": number, **answer_of(answers[one["example_id"]])}
            for number, one in enumerate(group)
            if one["scorer"] == part["scorer"] and one["example_id"] in answers
        ]
        path = logprobs_file(folder, facts["file"], part["row_group"], part["scorer"])
        if found:
            # An engine answers short rows first, whatever their place.
            write_logprobs(path, found[::-1])
    return facts["file"]


def answer_of(logprobs):
    if isinstance(logprobs, dict):
        return logprobs
    return {"logprobs": logprobs, "top_ids": None, "top_logprobs": None}


def assembled(folder, rows, answers, probes=None, overlapping=(), number=0):
    """What is written for these rows (scored, of the probe, rejected) and what is said of it."""
    name = stored(folder, rows, answers)
    assemble = MergeLogprobs(folder, ScoringPlan(probes or {}, frozenset(overlapping)), FACTS)
    said = json.loads(assemble({"file": name, "number": number})["facts"])
    tables = [
        pq.read_table(folder / "scored" / f"part-{number:06d}.parquet"),
        pq.read_table(folder / "probe" / f"{number:06d}.parquet"),
    ]
    assert [table.schema for table in tables] == [SCORED_SCHEMA, SCORED_SCHEMA]
    lines = (folder / "rejected" / f"{number:06d}.jsonl").read_text().splitlines()
    return *(table.to_pylist() for table in tables), [json.loads(line) for line in lines], said


def figures_of(*documents):
    figures = ScoreStats()
    for document in documents:
        figures.merge(document)
    return figures


def values(rows, name):
    return [one[name] for one in rows]


def test_a_row_is_its_tokens_with_what_the_model_of_its_author_said(folder):
    given = row("a", split="heldout", correct=True, trainable=[True, False], truncated=True)
    (found,), probe, rejected, _ = assembled(folder, [given], {"a": [-0.5, 0.0]})
    assert (probe, rejected) == ([], [])
    assert found == {
        "example_id": "a",
        "prompt_ids": [4, 5],
        "response_ids": [7, 1],
        "behavior_logprobs": [-0.5, 0.0],
        "behavior_model": "models/tutor",
        "source": "tutor",
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


def test_each_row_of_each_scorer_has_its_own_logprobs_in_the_order_of_names(folder):
    rng = np.random.default_rng(0)
    names = [f"a-{number:02d}" for number in range(23)]
    lengths = rng.integers(1, 9, len(names))
    rows = [
        row(name, response_ids=list(range(length)), scorer=scorer, source=scorer)
        for name, length, scorer in zip(
            names, lengths, ["tutor", "coder", "tutor"] * 8, strict=False
        )
    ]
    answers = {name: [-n / 32] * lengths[n] for n, name in enumerate(names)}
    shuffled = [rows[n] for n in rng.permutation(len(rows))]
    found, *_ = assembled(folder, shuffled, answers)
    assert values(found, "example_id") == names
    assert values(found, "behavior_logprobs") == [answers[name] for name in names]
    assert values(found, "response_ids") == values(rows, "response_ids")
    models = [f"models/{one['scorer']}" for one in rows]
    assert values(found, "behavior_model") == models


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_whose_model_says_no_number_is_rejected(folder, value):
    rows = [row("a"), row("b", recorded_logprobs=[-1.0, -1.0]), row("c")]
    answers = {"a": [-1.0, -2.0], "b": [-1.0, value], "c": [-3.0, -4.0]}
    found, probe, rejected, said = assembled(folder, rows, answers, {"tutor": 1.0})
    assert values(found, "example_id") == values(probe, "example_id") == ["a", "c"]
    assert values(found, "behavior_logprobs") == [[-1.0, -2.0], [-3.0, -4.0]]
    assert rejected == [{"example_id": "b", "reason": NOT_FINITE}]
    assert figures_of(said).num_rejected == 1


def test_rows_that_are_no_use_are_listed_in_order_with_their_reasons(folder):
    nobody = {"source": None, "scorer": None, "split": None, "content": None}
    rows = [
        row("d", content=1),
        row("e", content=1, split="heldout"),
        row("b", reason="worse", prompt_ids=[], response_ids=[]),
        row("a", **nobody, reason="b\u00e4d\n", prompt_ids=[], response_ids=[]),
        row("c"),
    ]
    answers = {"c": [-1.0, -2.0], "d": [-9.0, -9.0], "e": [-3.0, -4.0]}
    found, probe, rejected, said = assembled(folder, rows, answers, {"tutor": 1.0}, [1])
    assert values(found, "example_id") == values(probe, "example_id") == ["c", "e"]
    leak = "split: read 'train'; expected 'heldout', as rows of this prompt are"
    assert rejected == [
        {"example_id": "a", "reason": "b\u00e4d\n"},
        {"example_id": "b", "reason": "worse"},
        {"example_id": "d", "reason": leak},
    ]
    assert figures_of(said).num_rejected == 3
    assert figures_of(said).by_source()["tutor"]["rows"] == 2


def test_a_file_of_rows_that_are_no_use_is_empty(folder):
    rows = [row(name, scorer=None, source=None, reason="bad") for name in "abc"]
    found, probe, rejected, said = assembled(folder, rows, {}, {"tutor": 1.0})
    assert (found, probe) == ([], [])
    assert values(rejected, "example_id") == ["a", "b", "c"]
    assert figures_of(said).by_source() == {}


def test_recorded_logprobs_are_taken_over_where_no_model_was_asked(folder):
    rows = [row("a", recorded_logprobs=[-0.25, -0.5]), row("b"), row("c", source="web")]
    found, *_ = assembled(folder, rows, {"b": [-1.0, -2.0], "c": [-3.0, -4.0]})
    assert values(found, "behavior_logprobs") == [[-0.25, -0.5], [-1.0, -2.0], [-3.0, -4.0]]
    assert values(found, "logprobs_from") == ["recorded", "behavior", "reference"]
    assert values(found, "recorded_gap") == [None, None, None]
    # The author of a row stays its author, whoever scored it.
    assert values(found, "source") == ["tutor", "tutor", "web"]
    assert values(found, "behavior_model") == ["models/tutor"] * 3


def test_a_part_without_any_answers_needs_none_where_all_rows_bring_logprobs(folder):
    rows = [row(name, recorded_logprobs=[-0.25, -0.5]) for name in "abc"]
    found, *_ = assembled(folder, rows, {})
    assert not list((folder / "logprobs").iterdir())
    assert values(found, "logprobs_from") == ["recorded"] * 3


def test_a_row_of_the_probe_keeps_what_was_computed_and_how_far_its_record_was(folder):
    recorded = {"recorded_logprobs": [-1.0, -2.0]}
    rows = [row("a", **recorded), row("b", source="coder", scorer="coder", **recorded), row("c")]
    answers = {"a": [-1.125, -1.5], "c": [-3.0, -4.0]}
    found, probe, _, said = assembled(folder, rows, answers, {"tutor": 1.0})
    assert probe == [found[0], found[2]]
    assert values(found, "behavior_logprobs") == [[-1.125, -1.5], [-1.0, -2.0], [-3.0, -4.0]]
    assert values(found, "logprobs_from") == ["behavior", "recorded", "behavior"]
    assert values(found, "recorded_gap") == [0.5, None, None]
    by_source = figures_of(said).by_source()
    assert by_source["tutor"]["recorded_gap_max"] == 0.5
    assert by_source["tutor"]["recorded_gap_mean"] == (0.125 + 0.5) / 2
    assert by_source["coder"]["recorded_gap_max"] is None
    assert by_source["coder"]["recorded_gap_mean"] is None


def test_the_probe_holds_the_rows_that_the_selection_draws(folder):
    rows = [row(f"a-{number:03d}") for number in range(100)]
    chosen = ScoringPlan({"tutor": 0.3}, frozenset()).probed(
        pa.Table.from_pylist(rows, TOKENIZED_SCHEMA)
    )
    answers = {one["example_id"]: [-1.0, -1.0] for one in rows}
    found, probe, *_ = assembled(folder, rows, answers, {"tutor": 0.3})
    assert 10 < len(probe) < 60
    assert probe == [one for one, is_in in zip(found, chosen, strict=True) if is_in]


def test_the_likeliest_tokens_stay_with_their_row(folder):
    top = {
        name: {
            "logprobs": [-1.0, -2.0],
            "top_ids": [n, n + 1, n + 2, n + 3],
            "top_logprobs": [-0.5, -1.0, -0.25, -n],
        }
        for n, name in enumerate("ac", start=2)
    }
    rows = [row("a"), row("b", recorded_logprobs=[-0.25, -0.5]), row("c")]
    found, *_ = assembled(folder, rows, top)
    assert values(found, "top_ids") == [[2, 3, 4, 5], None, [3, 4, 5, 6]]
    assert values(found, "top_logprobs") == [[-0.5, -1, -0.25, -2], None, [-0.5, -1, -0.25, -3]]


@pytest.mark.parametrize("answers", [{}, {"a": [-1.0, -1.0]}])
def test_a_row_that_was_never_scored_is_no_mistake_of_the_corpus(folder, answers):
    rows = [row("a"), row("b")]
    name = stored(folder, rows, answers)
    assemble = MergeLogprobs(folder, ScoringPlan({}, frozenset()), FACTS)
    missing = 1 if answers else 0
    with pytest.raises(RuntimeError, match=f"{name}: row {missing} of part 0 was never scored"):
        assemble({"file": name, "number": 0})


def test_figures_count_every_row_under_its_source_over_all_files(folder):
    recorded = {"recorded_logprobs": [-1.0, -2.0]}
    first = [
        row("a", **recorded),
        row("b", truncated=True),
        row("c", source="web", response_ids=[1]),
        row("d", reason="bad"),
    ]
    second = [row("e", **recorded), row("f", source="coder", scorer="coder"), row("g", **recorded)]
    one = assembled(
        folder, first, {"a": [-1.5, -2.0], "b": [-1.0, -1.0], "c": [-1.0]}, {"tutor": 1.0}
    )
    other = assembled(
        folder, second, {"e": [-1.0, -2.25], "f": [-1.0, -1.0]}, {"tutor": 0.0}, number=1
    )
    expected = {
        "coder": {
            "rows": 1,
            "response_tokens": 2,
            "truncated": 0,
            "from_behavior": 1,
            "recorded_gap_mean": None,
            "recorded_gap_max": None,
        },
        "tutor": {
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
        figures = figures_of(*documents)
        assert figures.num_rejected == 1
        assert figures.by_source() == expected
        # What was merged can be handed on like what was counted.
        assert figures_of(json.loads(json.dumps(figures.document()))).by_source() == expected


def test_a_repeated_call_writes_the_same_bytes(folder):
    rows = [row(name, recorded_logprobs=[-1.0, -2.0]) for name in "abcd"]
    name = stored(folder, rows, {"b": [-1.0, -2.5]})
    assemble = MergeLogprobs(folder, ScoringPlan({"tutor": 0.5}, frozenset()), FACTS)
    written = []
    for _ in range(2):
        said = assemble({"file": name, "number": 0})
        files = sorted(folder.rglob("*000000.*"))
        assert len(files) == 3
        written.append([said, *(path.read_bytes() for path in files)])
    assert written[0] == written[1]
