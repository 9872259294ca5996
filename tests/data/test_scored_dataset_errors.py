"""Scored datasets that are rejected, each by file, row and field."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pyarrow as pa
import pytest

from pear_ray.data.scored_dataset import OPTIONAL_COLUMNS, scan_dataset
from pear_ray.errors import ConfigError
from pear_ray.records import SCORED_SCHEMA
from pear_ray.run import LAYOUT
from tests.data.scored_rows import GOOD, WANTED, of_length, row, stored, table_of

WITH_TEACHER = replace(WANTED, top_logprobs=True)


def assert_rejected(folder, row_filter, expected):
    """The whole message matches `expected`, a pattern in which FOLDER is the folder."""
    with pytest.raises(ConfigError) as error:
        scan_dataset(folder, row_filter)
    pattern = expected.replace("FOLDER", re.escape(str(folder)))
    assert re.fullmatch(pattern, str(error.value)), str(error.value)


PER_TOKEN = "one value per response token"
PER_TOKEN_TOP_K = "the same number for every response token"
FITS = r"at most 8 tokens with the prompt \(learner\.tokens_per_micro_batch\)"
OTHER_VOCABULARY, OTHER_TEMPLATE = (rf"{name} \(the model's\)" for name in ("vocabulary", "template"))
NOT_EMPTY, SPLITS = "at least one token", "'train' or 'heldout'"
# Name of the mistake: (changes to a good row, field, expected, got).
BAD_ROWS = {
    "another vocabulary": ({"tokenizer_digest": "words"}, "tokenizer_digest", OTHER_VOCABULARY, "words"),
    "another template": ({"template_digest": "chatml"}, "template_digest", OTHER_TEMPLATE, "chatml"),
    "no digest": ({"tokenizer_digest": None}, "tokenizer_digest", OTHER_VOCABULARY, "None"),
    "unknown split": ({"split": "test"}, "split", SPLITS, "test"),
    "no split": ({"split": None}, "split", SPLITS, "None"),
    "empty response": (of_length(2, 0), "response_ids", NOT_EMPTY, "0"),
    "no response": (of_length(2, 0) | {"response_ids": None}, "response_ids", NOT_EMPTY, "0"),
    "empty prompt": ({"prompt_ids": []}, "prompt_ids", NOT_EMPTY, "0"),
    "no prompt": ({"prompt_ids": None}, "prompt_ids", NOT_EMPTY, "0"),
    "too long a response": (of_length(2, 7), "response_ids", FITS, "9"),
    "too long a prompt": (of_length(6, 3), "response_ids", FITS, "9"),
    **{
        f"{len(logprobs or [])} log-probs ({type(logprobs).__name__})": (
            {"behavior_logprobs": logprobs},
            "behavior_logprobs",
            PER_TOKEN,
            str(len(logprobs or [])),
        )
        for logprobs in ([-1.0, -1.0], [-1.0] * 4, [], None)
    },
    **{
        f"{value} for log-prob {place}": (
            {"behavior_logprobs": [value if n == place else -1.0 for n in range(3)]},
            "behavior_logprobs",
            "finite values",
            str(value).replace("None", "nan"),
        )
        for value, place in ((math.nan, 0), (math.nan, 2), (math.inf, 1), (-math.inf, 1), (None, 0))
    },
    "both infinities": (
        {"behavior_logprobs": [math.inf, -1.0, -math.inf]},
        "behavior_logprobs",
        "finite values",
        "-inf",
    ),
    "positive log-prob": (
        {"behavior_logprobs": [-1.0, -1.0, 0.5]},
        "behavior_logprobs",
        "log-probs of at most 0",
        "0.5",
    ),
    **{
        f"id {token} in {field}": (
            {field: [4, token, 5]},
            field,
            "ids of at least 0" if token < 0 else "ids below 100",
            rf"{token}(\.0)?",
        )
        for field in ("prompt_ids", "response_ids")
        for token in (-1, 100, 2**31 - 1)
    },
}
# Rejected only if the teacher's top-k log-probs are required.
BAD_TEACHERS = {
    "no top-k": ({"top_ids": None}, "top_ids", PER_TOKEN_TOP_K, "0"),
    "empty top-k": ({"top_ids": []}, "top_ids", PER_TOKEN_TOP_K, "0"),
    "uneven top-k": ({"top_ids": [7, 9, 8, 3]}, "top_ids", PER_TOKEN_TOP_K, "4"),
}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_rejected_by_name(tmp_path, bad):
    changes, field, expected, got = bad
    last = table_of(row("d"), row("e"), row("f"), row("g", **changes))
    message = rf"FOLDER/1\.parquet: 'g': {field}: expected {expected}, got {got}"
    assert_rejected(stored(tmp_path, GOOD, last, GOOD), WANTED, message)


@pytest.mark.parametrize("bad", BAD_TEACHERS.values(), ids=BAD_TEACHERS)
def test_bad_teacher_is_rejected_if_required(tmp_path, bad):
    changes, field, expected, got = bad
    folder = stored(tmp_path, table_of(row("a"), row("b", **changes)))
    message = rf"FOLDER/0\.parquet: 'b': {field}: expected {expected}, got {got}"
    assert_rejected(folder, WITH_TEACHER, message)
    assert len(scan_dataset(folder, WANTED)) == 1


# Rows that would fail or mislead a learner in the middle of training: (changes, field).
MISFITS = {
    "null among response ids": ({"response_ids": [7, None, 1]}, "response_ids"),
    "null among prompt ids": ({"prompt_ids": [None, 5]}, "prompt_ids"),
    "no source": ({"source": None}, "source"),
    "fewer trainable flags": ({"trainable": [True, False]}, "trainable"),
    "one trainable flag": ({"trainable": [True]}, "trainable"),
    "more trainable flags": ({"trainable": [True] * 4}, "trainable"),
    "no trainable token": ({"trainable": [False] * 3}, "trainable"),
    "no top-k log-probs": ({"top_logprobs": None}, "top_logprobs"),
    "fewer top-k log-probs": ({"top_logprobs": [-1.0] * 3}, "top_logprobs"),
    "NaN among top-k log-probs": ({"top_logprobs": [-1.0] * 5 + [math.nan]}, "top_logprobs"),
    "unknown top-k id": ({"top_ids": [7, 9, 8, 3, 1, 100]}, "top_ids"),
    "negative top-k id": ({"top_ids": [-1, 9, 8, 3, 1, 2]}, "top_ids"),
    "another k": ({"top_ids": [7, 8, 1], "top_logprobs": [-1.0] * 3}, "top_ids"),
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_misfit_row_is_rejected_by_name(tmp_path, misfit):
    changes, field = misfit
    folder = stored(tmp_path, table_of(row("a"), row("b", **changes)))
    assert_rejected(folder, WITH_TEACHER, rf"FOLDER/0\.parquet: 'b': {field}: expected .+, got .+")


@pytest.mark.parametrize("rows_per_group", [1, 2])
def test_top_k_must_be_equal_in_all_rows(tmp_path, rows_per_group):
    """Across row groups and files: a micro-batch may hold any of them together."""
    fewer = row("d", top_ids=[7, 8, 1], top_logprobs=[-1.0] * 3)
    folder = stored(tmp_path, GOOD, table_of(row("c"), fewer), rows_per_group=rows_per_group)
    assert_rejected(folder, WITH_TEACHER, r"FOLDER/1\.parquet: 'd': top_ids: expected .+, got .+")
    other = tmp_path / "other"
    other.mkdir()
    stored(other, GOOD, table_of(fewer))
    assert_rejected(other, WITH_TEACHER, r"FOLDER/1\.parquet: 'd': top_ids: expected .+, got .+")


def without(name):
    return lambda folder: stored(folder, GOOD, GOOD.drop_columns([name]))


def of_type(name, kind, values=None):
    """Write two files, the second with a column of another type."""

    def write(folder):
        column = pa.array(GOOD.column(name).to_pylist() if values is None else values, kind)
        changed = GOOD.set_column(GOOD.schema.get_field_index(name), name, column)
        stored(folder, GOOD, changed)

    return write


def with_bytes(change):
    """Write a good file and change its bytes."""

    def write(folder):
        path = stored(folder, GOOD) / "0.parquet"
        path.write_bytes(change(path.read_bytes()))

    return write


def without_parquet(folder):
    (folder / "rejected.jsonl").write_text('{"example_id": "a", "reason": "worse"}\n')
    (folder / "below").mkdir()
    stored(folder / "below", GOOD)


def corrupt_pages(whole):
    """Corrupt all pages and keep the footer."""
    length = int.from_bytes(whole[-8:-4], "little") + 8
    return whole[:4] + bytes(255 - byte for byte in whole[4:-length]) + whole[-length:]


NO_PARQUET = r"FOLDER/0\.parquet: expected Parquet of stage `score`: .+"
BAD_FILES = {
    "no files": (without_parquet, r"FOLDER: expected \.parquet files of stage `score`, got none"),
    "another kind of file": (with_bytes(lambda whole: b'{"example_id": "a"}\n' * 9), NO_PARQUET),
    "an empty file": (with_bytes(lambda whole: b""), NO_PARQUET),
    "truncated footer": (with_bytes(lambda whole: whole[:-20]), NO_PARQUET),
    "truncated file": (with_bytes(lambda whole: whole[: len(whole) // 2]), NO_PARQUET),
    "file without its beginning": (with_bytes(lambda whole: whole[-64:]), NO_PARQUET),
    "corrupt pages": (with_bytes(corrupt_pages), r"FOLDER/0\.parquet: expected readable pages: (.|\n)+"),
    **{
        f"no {name}": (without(name), rf"FOLDER/1\.parquet: {name}: expected this column of stage `score`")
        for name in SCORED_SCHEMA.names
        if name not in OPTIONAL_COLUMNS
    },
    **{
        f"{kind} for {name}": (
            of_type(name, kind, values),
            rf"FOLDER/1\.parquet: {name}: expected type {expected}, got {got}",
        )
        for name, kind, values, got, expected in (
            ("example_id", pa.int64(), [1, 2, 3], "int64", "string"),
            ("prompt_ids", pa.list_(pa.int64()), None, r"list<.+: int64>", r"list<.+: int32>"),
            ("response_ids", pa.string(), ["7 8 1"] * 3, "string", r"list<.+: int32>"),
            ("behavior_logprobs", pa.list_(pa.float64()), None, r"list<.+: double>", r"list<.+: float>"),
            ("correct", pa.string(), ["yes"] * 3, "string", "bool"),
            ("trainable", pa.list_(pa.int8()), [[1, 1, 1]] * 3, r"list<.+: int8>", r"list<.+>"),
        )
    },
    **{
        f"only nulls for {name}": (
            of_type(name, pa.null(), [None] * 3),
            rf"FOLDER/1\.parquet: ('a': )?{name}: expected .+, got .+",
        )
        for name in ("response_ids", "behavior_logprobs", "split", "source", "tokenizer_digest")
    },
}


@pytest.mark.parametrize(("write", "expected"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_rejected_by_name(tmp_path, write, expected):
    write(tmp_path)
    assert_rejected(tmp_path, WANTED, expected)


@pytest.mark.parametrize("name", ["top_ids", "top_logprobs"])
def test_top_k_columns_are_optional_unless_required(tmp_path, name):
    without(name)(tmp_path)
    message = rf"FOLDER/1\.parquet: {name}: expected this column of stage `score`"
    assert_rejected(tmp_path, WITH_TEACHER, message)
    assert len(scan_dataset(tmp_path, WANTED)) == 4


def test_first_mistake_of_first_bad_file_is_reported(tmp_path):
    worse = table_of(row("d", split="test"), row("e", source="teacher_cipher", prompt_ids=[]))
    folder = stored(tmp_path, GOOD, worse, table_of(row("f", template_digest="other")))
    assert_rejected(folder, WANTED, r"FOLDER/1\.parquet: 'd': split: .+")


def test_missing_folder_is_rejected(tmp_path):
    assert_rejected(tmp_path / "nowhere", WANTED, r"FOLDER: expected \.parquet files of stage `score`, got none")


def test_a_corpus_of_an_older_layout_is_rejected(tmp_path):
    (stored(tmp_path, GOOD) / "facts.json").write_text('{"rows": 3}')
    assert_rejected(tmp_path, WANTED, rf"FOLDER/facts\.json: expected layout {LAYOUT}, got .* run again: score")
    (tmp_path / "facts.json").write_text(json.dumps({"layout": LAYOUT, "rows": 3}))
    assert len(scan_dataset(tmp_path, WANTED)) == 2
