"""Scored corpora that are no use to `sft`: each is refused by file, row and field."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pyarrow as pa
import pytest

from pear_ray.data.scored_dataset import OPTIONAL_COLUMNS, scan_dataset
from pear_ray.errors import ConfigError
from pear_ray.records import SCORED_SCHEMA
from tests.data.scored_rows import GOOD, WANTED, row, stored, table_of

TAUGHT = replace(WANTED, top_logprobs=True)


def assert_refused(folder, wanted, said):
    """Every word of the message is as `said`, a pattern in which FOLDER is the folder."""
    with pytest.raises(ConfigError) as refusal:
        scan_dataset(folder, wanted)
    pattern = said.replace("FOLDER", re.escape(str(folder)))
    assert re.fullmatch(pattern, str(refusal.value)), str(refusal.value)


def of_length(num_prompt, num_response):
    ids, logprobs = [7] * num_response, [-1.0] * num_response
    return {
        "prompt_ids": [4] * num_prompt,
        **dict.fromkeys(("response_ids", "top_ids"), ids),
        **dict.fromkeys(("behavior_logprobs", "top_logprobs"), logprobs),
    }


PER_TOKEN = "one number for each of the response's tokens"
TOP_PER_TOKEN = "as many for each of the response's tokens"
FITS = r"at most 8, the learner\.tokens_per_micro_batch of all who share one"
OF_THE_MODEL = "that of the model to be trained"
# What is wrong: (changes to a good row, field, what was read, what was expected).
BAD_ROWS = {
    "another vocabulary": (
        {"tokenizer_digest": "words"},
        "tokenizer_digest",
        "words",
        f"vocabulary, {OF_THE_MODEL}",
    ),
    "another template": (
        {"template_digest": "chatml"},
        "template_digest",
        "chatml",
        f"template, {OF_THE_MODEL}",
    ),
    "no digest": (
        {"tokenizer_digest": None},
        "tokenizer_digest",
        "None",
        f"vocabulary, {OF_THE_MODEL}",
    ),
    "an unknown split": ({"split": "test"}, "split", "'?test'?", "'train' or 'heldout'"),
    "no split": ({"split": None}, "split", "None", "'train' or 'heldout'"),
    "an empty response": (of_length(2, 0), "response_ids", "0", "at least one token"),
    "no response": (
        of_length(2, 0) | {"response_ids": None},
        "response_ids",
        "0",
        "at least one token",
    ),
    "an empty prompt": ({"prompt_ids": []}, "prompt_ids", "0", "at least one token"),
    "no prompt": ({"prompt_ids": None}, "prompt_ids", "0", "at least one token"),
    "too long a response": (of_length(2, 7), "response_ids", "9", FITS),
    "too long a prompt": (of_length(6, 3), "response_ids", "9", FITS),
    **{
        f"{kind} log-probs": (
            {"behavior_logprobs": logprobs},
            "behavior_logprobs",
            str(len(logprobs or [])),
            PER_TOKEN,
        )
        for kind, logprobs in {
            "fewer": [-1.0, -1.0],
            "more": [-1.0] * 4,
            "empty": [],
            "no": None,
        }.items()
    },
    **{
        f"{value} for log-prob {place}": (
            {"behavior_logprobs": [value if n == place else -1.0 for n in range(3)]},
            "behavior_logprobs",
            str(value).replace("None", "nan"),
            "finite numbers",
        )
        for value, place in ((math.nan, 0), (math.nan, 2), (math.inf, 1), (-math.inf, 1), (None, 0))
    },
    "both infinities": (
        {"behavior_logprobs": [math.inf, -1.0, -math.inf]},
        "behavior_logprobs",
        "-inf",
        "finite numbers",
    ),
    "a log of more than 1": (
        {"behavior_logprobs": [-1.0, -1.0, 0.5]},
        "behavior_logprobs",
        "0.5",
        "logs of probabilities, at most 0",
    ),
    **{
        f"id {token} in {field}": (
            {field: [4, token, 5]},
            field,
            rf"{token}(\.0)?",
            "ids of at least 0" if token < 0 else "ids below 100",
        )
        for field in ("prompt_ids", "response_ids")
        for token in (-1, 100, 2**31 - 1)
    },
}
# The same where distillation wants the behavior policy's likeliest tokens.
BAD_TEACHERS = {
    "no likeliest tokens": ({"top_ids": None}, "top_ids", "0", TOP_PER_TOKEN),
    "empty likeliest tokens": ({"top_ids": []}, "top_ids", "0", TOP_PER_TOKEN),
    "uneven likeliest tokens": ({"top_ids": [7, 9, 8, 3]}, "top_ids", "4", TOP_PER_TOKEN),
}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_by_name(tmp_path, bad):
    changes, field, read, expected = bad
    last = table_of(row("d"), row("e"), row("f"), row("g", **changes))
    said = rf"FOLDER/1\.parquet: 'g': {field}: read {read}; expected {expected}"
    assert_refused(stored(tmp_path, GOOD, last, GOOD), WANTED, said)


@pytest.mark.parametrize("bad", BAD_TEACHERS.values(), ids=BAD_TEACHERS)
def test_a_bad_teacher_is_refused_where_one_is_wanted(tmp_path, bad):
    changes, field, read, expected = bad
    folder = stored(tmp_path, table_of(row("a"), row("b", **changes)))
    said = rf"FOLDER/0\.parquet: 'b': {field}: read {read}; expected {expected}"
    assert_refused(folder, TAUGHT, said)
    assert len(scan_dataset(folder, WANTED)) == 1


# What would break or mislead a learner in the middle of training: (changes, field).
MISFITS = {
    "nothing among ids": ({"response_ids": [7, None, 1]}, "response_ids"),
    "nothing among a prompt's ids": ({"prompt_ids": [None, 5]}, "prompt_ids"),
    "no source": ({"source": None}, "source"),
    "trainable of fewer tokens": ({"trainable": [True, False]}, "trainable"),
    "trainable of one token": ({"trainable": [True]}, "trainable"),
    "trainable of more tokens": ({"trainable": [True] * 4}, "trainable"),
    "nothing to learn": ({"trainable": [False] * 3}, "trainable"),
    "no log-probs of the likeliest": ({"top_logprobs": None}, "top_logprobs"),
    "fewer log-probs of the likeliest": ({"top_logprobs": [-1.0] * 3}, "top_logprobs"),
    "NaN among the likeliest": ({"top_logprobs": [-1.0] * 5 + [math.nan]}, "top_logprobs"),
    "an unknown likeliest token": ({"top_ids": [7, 9, 8, 3, 1, 100]}, "top_ids"),
    "a likeliest token below 0": ({"top_ids": [-1, 9, 8, 3, 1, 2]}, "top_ids"),
    "other numbers of likeliest tokens": (
        {"top_ids": [7, 8, 1], "top_logprobs": [-1.0] * 3},
        "top_ids",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_a_row_that_no_learner_could_take_is_refused_by_name(tmp_path, misfit):
    changes, field = misfit
    folder = stored(tmp_path, table_of(row("a"), row("b", **changes)))
    said = rf"FOLDER/0\.parquet: 'b': {field}: read .+; expected .+"
    assert_refused(folder, TAUGHT, said)


@pytest.mark.parametrize("rows_per_group", [1, 2])
def test_all_rows_have_as_many_likeliest_tokens(tmp_path, rows_per_group):
    """Over row groups and files: a micro-batch may hold any of them side by side."""
    fewer = row("d", top_ids=[7, 8, 1], top_logprobs=[-1.0] * 3)
    folder = stored(tmp_path, GOOD, table_of(row("c"), fewer), rows_per_group=rows_per_group)
    assert_refused(folder, TAUGHT, r"FOLDER/1\.parquet: 'd': top_ids: read .+; expected .+")
    other = tmp_path / "other"
    other.mkdir()
    stored(other, GOOD, table_of(fewer))
    assert_refused(other, TAUGHT, r"FOLDER/1\.parquet: 'd': top_ids: read .+; expected .+")


def without(name):
    return lambda folder: stored(folder, GOOD, GOOD.drop_columns([name]))


def of_type(name, kind, values=None):
    """With a column of another type, in the second of two files."""

    def write(folder):
        column = pa.array(GOOD.column(name).to_pylist() if values is None else values, kind)
        changed = GOOD.set_column(GOOD.schema.get_field_index(name), name, column)
        stored(folder, GOOD, changed)

    return write


def with_bytes(change):
    """A good file whose bytes are changed."""

    def write(folder):
        path = stored(folder, GOOD) / "0.parquet"
        path.write_bytes(change(path.read_bytes()))

    return write


def without_parquet(folder):
    (folder / "rejected.jsonl").write_text('{"example_id": "a", "reason": "worse"}\n')
    (folder / "below").mkdir()
    stored(folder / "below", GOOD)


def scrambled(whole):
    """All pages spoilt, the footer whole."""
    length = int.from_bytes(whole[-8:-4], "little") + 8
    return whole[:4] + bytes(255 - byte for byte in whole[4:-length]) + whole[-length:]


NO_PARQUET = r"FOLDER/0\.parquet: .+; expected a Parquet file of stage `score`"
BAD_FILES = {
    "no files": (
        without_parquet,
        r"FOLDER: holds no \.parquet file; expected what stage `score` writes",
    ),
    "another kind of file": (with_bytes(lambda whole: b'{"example_id": "a"}\n' * 9), NO_PARQUET),
    "an empty file": (with_bytes(lambda whole: b""), NO_PARQUET),
    "a file that breaks off in its footer": (with_bytes(lambda whole: whole[:-20]), NO_PARQUET),
    "half a file": (with_bytes(lambda whole: whole[: len(whole) // 2]), NO_PARQUET),
    "a file without its beginning": (with_bytes(lambda whole: whole[-64:]), NO_PARQUET),
    "spoilt pages": (with_bytes(scrambled), r"FOLDER/0\.parquet: (.|\n)+; expected .+"),
    **{
        f"no {name}": (
            without(name),
            rf"FOLDER/1\.parquet: {name}: no such column; expected it of stage `score`",
        )
        for name in SCORED_SCHEMA.names
        if name not in OPTIONAL_COLUMNS
    },
    **{
        f"{kind} for {name}": (
            of_type(name, kind, values),
            rf"FOLDER/1\.parquet: {name}: read type {read}; expected {expected}",
        )
        for name, kind, values, read, expected in (
            ("example_id", pa.int64(), [1, 2, 3], "int64", "string"),
            ("prompt_ids", pa.list_(pa.int64()), None, r"list<.+: int64>", r"list<.+: int32>"),
            ("response_ids", pa.string(), ["7 8 1"] * 3, "string", r"list<.+: int32>"),
            (
                "behavior_logprobs",
                pa.list_(pa.float64()),
                None,
                r"list<.+: double>",
                r"list<.+: float>",
            ),
            ("correct", pa.string(), ["yes"] * 3, "string", "bool"),
            ("trainable", pa.list_(pa.int8()), [[1, 1, 1]] * 3, r"list<.+: int8>", r"list<.+>"),
        )
    },
    **{
        f"nothing but nulls for {name}": (
            of_type(name, pa.null(), [None] * 3),
            rf"FOLDER/1\.parquet: ('a': )?{name}: read .+; expected .+",
        )
        for name in ("response_ids", "behavior_logprobs", "split", "source", "tokenizer_digest")
    },
}


@pytest.mark.parametrize(("write", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_by_name(tmp_path, write, said):
    write(tmp_path)
    assert_refused(tmp_path, WANTED, said)


@pytest.mark.parametrize("name", ["top_ids", "top_logprobs"])
def test_likeliest_tokens_need_be_there_only_where_they_are_wanted(tmp_path, name):
    without(name)(tmp_path)
    said = rf"FOLDER/1\.parquet: {name}: no such column; expected it of stage `score`"
    assert_refused(tmp_path, TAUGHT, said)
    assert len(scan_dataset(tmp_path, WANTED)) == 4


def test_the_first_mistake_of_the_first_file_is_told(tmp_path):
    worse = table_of(row("d", split="test"), row("e", source="coder", prompt_ids=[]))
    folder = stored(tmp_path, GOOD, worse, table_of(row("f", template_digest="other")))
    assert_refused(folder, WANTED, r"FOLDER/1\.parquet: 'd': split: .+")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert_refused(tmp_path / "nowhere", WANTED, r"FOLDER: holds no \.parquet file; expected .+")
