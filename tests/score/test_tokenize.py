"""Tokenization of good corpus rows: ids, attribution and trainable tokens."""

from __future__ import annotations

import hashlib
import json
import math
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.config import Columns
from pear_ray.records import EXAMPLE_SCHEMA, TOKENIZED_SCHEMA

END = 1
HALVES = {"prompt": "question", "response": "answer"}
WORDS = st.lists(st.integers(0, 96).map("w{}".format), min_size=1, max_size=4).map(" ".join)
QUESTIONS = st.lists(st.tuples(st.sampled_from(["user", "system", "tool"]), WORDS), min_size=1)
LONG = {"max_model_len": 1000}


def ids(words):
    """Token ids by the order of the tiny model's vocabulary: three special tokens, then w0."""
    return [int(word[1:]) + 3 for word in words.split()]


def message(role, content):
    return {"role": role, "content": content}


def turns(*contents):
    """A conversation of the user and the assistant in turn."""
    return [message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]


def row(**changes):
    good = {"example_id": "a-1", "messages": turns("w1 w2 w3", "w4 w5"), "source": "teacher_plain"}
    return good | changes


def from_json(tokenize, *rows):
    places = [f"f.jsonl:{number}" for number in range(1, len(rows) + 1)]
    texts = pa.array([json.dumps(row).encode() for row in rows], pa.binary())
    found = tokenize.from_json_lines(pa.table({"text": texts, "place": places}))
    assert found.schema == TOKENIZED_SCHEMA
    return found.to_pylist()


def from_parquet(tokenize, *rows, schema=EXAMPLE_SCHEMA):
    found = tokenize.from_parquet(pa.Table.from_pylist(rows, schema))
    assert found.schema == TOKENIZED_SCHEMA
    return found.to_pylist()


def usable(found):
    """Return the rows, none of which may be rejected."""
    assert {one["reason"] for one in found} <= {""}
    return found


@pytest.mark.parametrize("read", [from_json, from_parquet])
def test_good_row(make_tokenizer, read):
    recorded = [-0.5, 0.0, -0.125]
    good_row = row(split="heldout", correct=True, response_ids=[7, 8, END], behavior_logprobs=recorded)
    (found,) = read(make_tokenizer(), good_row)
    assert -(2**63) <= found.pop("content") < 2**63
    assert len(bytes.fromhex(found.pop("digest"))) == 8
    assert found == {
        "example_id": "a-1",
        "source": "teacher_plain",
        "scorer": "teacher_plain",
        "split": "heldout",
        "split_is_given": True,
        "correct": True,
        "prompt_ids": [4, 5, 6],
        "response_ids": [7, 8, END],
        "trainable": None,
        "recorded_logprobs": recorded,
        "truncated": False,
        "reason": "",
    }


def test_messages_and_source_suffice(make_tokenizer):
    bare = {"messages": turns("w1", "w2"), "source": "teacher_cipher"}
    (found,) = usable(from_json(make_tokenizer(), bare))
    assert (found["prompt_ids"], found["response_ids"]) == ([4], [5, END])
    assert (found["split"], found["split_is_given"], found["correct"]) == ("train", False, None)
    assert found["recorded_logprobs"] is None


@pytest.mark.parametrize("read", [from_json, from_parquet])
def test_empty_table(make_tokenizer, read):
    assert read(make_tokenizer()) == []


@pytest.mark.parametrize(("name", "expected"), [("a-7", "a-7"), (17, "17"), ("\0", "\0")])
def test_example_id_is_kept(make_tokenizer, name, expected):
    for read in (from_json, lambda *args: from_parquet(*args, schema=None)):
        (found,) = usable(read(make_tokenizer(), row(example_id=name)))
        assert found["example_id"] == expected


def test_default_example_id_is_a_hash_of_the_content(make_tokenizer):
    unnamed = row(example_id=None, correct=True)
    reversed_messages = [dict([*message.items()][::-1]) for message in unnamed["messages"]]
    shuffled = {"source": "teacher_plain", "example_id": "", "messages": reversed_messages}
    others = [
        row(example_id=None, source="teacher_cipher"),
        row(example_id=None, messages=turns("w1 w2 w3", "w4 w6")),
        row(example_id=None, messages=turns("w1 w2", "w4 w5")),
    ]
    found = usable(from_json(make_tokenizer(), *others, shuffled, unnamed))
    assert found[3]["example_id"] == found[4]["example_id"]
    assert len({one["example_id"] for one in found}) == 4
    assert found[4]["example_id"] == from_parquet(make_tokenizer(), unnamed)[0]["example_id"]
    # Rows are stored by this id: it must never change.
    content = b"""["teacher_plain", [{"content": "w1 w2 w3", "role": "user"}, """
    content += b"""{"content": "w4 w5", "role": "assistant"}]]"""
    assert found[4]["example_id"] == hashlib.sha256(content).hexdigest()[:16]


def test_example_id_of_a_rejected_row_is_its_place_or_digest(make_tokenizer):
    rows = (row(example_id=None, source="x"), row(example_id=None, source="y"))
    found = from_json(make_tokenizer(), *rows)
    assert [one["example_id"] for one in found] == ["f.jsonl:1", "f.jsonl:2"]
    found = from_parquet(make_tokenizer(), *rows)
    assert [one["example_id"] for one in found] == [one["digest"] for one in found]
    assert found[0]["digest"] != found[1]["digest"]


def test_columns_are_renamed(make_tokenizer):
    names = {name: f"their {name}" for name in Columns().model_dump() if name not in HALVES}
    whole = row(split="train", correct=False, response_ids=[7, 8, END], behavior_logprobs=[0] * 3)
    theirs = {names[name]: value for name, value in whole.items()}
    (expected,) = usable(from_json(make_tokenizer(), whole))
    (found,) = usable(from_json(make_tokenizer(columns=Columns(**names)), theirs))
    assert found | {"digest": ""} == expected | {"digest": ""}
    (found,) = from_json(make_tokenizer(columns=Columns(**names)), theirs | {"their split": "test"})
    assert found["reason"].startswith("their split: expected")


def test_prompt_and_response_columns(make_tokenizer):
    halves = {"example_id": "a-1", "source": "teacher_plain", "question": "w1 w2 w3", "answer": "w4 w5"}
    (expected,) = usable(from_json(make_tokenizer(), row()))
    halved = make_tokenizer(columns=Columns(**HALVES))
    for read in (from_json, lambda *args: from_parquet(*args, schema=None)):
        (found,) = usable(read(halved, halves | {"messages": "ignored"}))
        assert found | {"digest": ""} == expected | {"digest": ""}


def test_default_source(make_tokenizer):
    rows = (row(source=None), row(source=""), row(source="teacher_cipher"))
    found = usable(from_json(make_tokenizer(source="teacher_plain"), *rows))
    assert [one["source"] for one in found] == ["teacher_plain", "teacher_plain", "teacher_cipher"]
    assert [one["scorer"] for one in found] == ["teacher_plain", "teacher_plain", "teacher_cipher"]


def test_fallback_scorer_ignores_recorded_logprobs(make_tokenizer):
    recorded = {"behavior_logprobs": [-1.0, -1.0, -1.0]}
    rows = (row(source="web", **recorded), row(source="teacher_cipher", **recorded))
    found = usable(from_json(make_tokenizer(fallback_scorer="teacher_plain"), *rows))
    assert [one["source"] for one in found] == ["web", "teacher_cipher"]
    assert [one["scorer"] for one in found] == ["teacher_plain", "teacher_cipher"]
    assert [one["recorded_logprobs"] for one in found] == [None, [-1.0, -1.0, -1.0]]
    # A fallback scorer is no default source.
    (found,) = from_json(make_tokenizer(fallback_scorer="teacher_plain"), row(source=None))
    assert found["reason"].startswith("source: expected an entry of [behavior]")


@pytest.mark.parametrize("on_overlength", ["reject", "truncate"])
def test_row_that_fills_the_context_is_kept_whole(make_tokenizer, on_overlength):
    exact = row(messages=turns("w1 w2 w3 w4 w5", "w1 w2 w3 w4 w5 w6"))
    (found,) = usable(from_json(make_tokenizer(on_overlength=on_overlength), exact))
    assert len(found["prompt_ids"] + found["response_ids"]) == 12
    assert found["response_ids"][-1] == END and not found["truncated"]


@settings(deadline=None)
@given(limit=st.integers(3, 12), has_more=st.booleans())
def test_truncation_cuts_all_columns(make_tokenizer, limit, has_more):
    messages = turns("w1 w2", "w3 w4", "w5", "w6 w7")[: 4 if has_more else 2]
    num_response = 7 if has_more else 3
    long = row(messages=messages, behavior_logprobs=[-n / 8 for n in range(num_response)])
    (whole,) = usable(from_json(make_tokenizer(), long))
    (found,) = usable(from_json(make_tokenizer(max_model_len=limit, on_overlength="truncate"), long))
    num_kept = min(num_response, limit - 2)
    assert found["truncated"] == (num_kept < num_response)
    assert found["prompt_ids"] == whole["prompt_ids"]
    assert found["response_ids"] == whole["response_ids"][:num_kept]
    assert found["recorded_logprobs"] == whole["recorded_logprobs"][:num_kept]
    expected = [True, True, True, False, True, True, True][:num_kept]
    assert (found["trainable"] or [True] * num_kept) == expected


def test_recorded_ids_are_compared_before_truncation(make_tokenizer):
    cut = make_tokenizer(max_model_len=5, on_overlength="truncate")
    rows = (row(response_ids=[7, 8, END]), row(response_ids=[7, 8]))
    found = from_json(cut, *rows)
    assert [one["response_ids"] for one in found] == [[7, 8], []]
    assert found[1]["reason"].startswith("response_ids: expected")


@settings(max_examples=50, deadline=None)
@given(rounds=st.lists(st.tuples(QUESTIONS, WORDS), min_size=1, max_size=3))
def test_only_the_assistants_tokens_are_trainable(make_tokenizer, rounds):
    messages, expected, first = [], [], None
    for questions, answer in rounds:
        for role, content in questions:
            messages.append(message(role, content))
            expected += [(token, False) for token in ids(content)]
        first = len(expected) if first is None else first
        messages.append(message("assistant", answer))
        expected += [(token, True) for token in [*ids(answer), END]]
    (found,) = usable(from_json(make_tokenizer(**LONG), row(messages=messages)))
    assert found["prompt_ids"] == [token for token, _ in expected[:first]]
    assert found["response_ids"] == [token for token, _ in expected[first:]]
    own = [is_own for _, is_own in expected[first:]]
    assert found["trainable"] == (None if all(own) else own)


def test_recorded_logprobs_of_other_tokens_are_zeroed(make_tokenizer):
    messages = turns("w1", "w2", "w3 w4", "w5")
    recorded = [-1.0, -2.0, math.nan, 7.0, -3.0, -4.0]
    (found,) = usable(from_json(make_tokenizer(), row(messages=messages, behavior_logprobs=recorded)))
    assert found["trainable"] == [True, True, False, False, True, True]
    assert found["recorded_logprobs"] == [-1.0, -2.0, 0.0, 0.0, -3.0, -4.0]


def test_recorded_logprobs_may_be_integers_or_rounded_above_zero(make_tokenizer):
    recorded = [-(2**24) - 1, 0, 0.0009765625]
    (found,) = usable(from_json(make_tokenizer(), row(behavior_logprobs=recorded)))
    assert found["recorded_logprobs"] == [-(2.0**24), 0.0, 0.0009765625]


def test_ignored_recorded_logprobs_are_not_validated(make_tokenizer):
    recorded = [[-1.0, -1.0, -1.0], [math.nan], [10**400]]
    rows = [row(behavior_logprobs=values) for values in recorded]
    found = usable(from_json(make_tokenizer(recorded_logprobs="ignore"), *rows))
    assert [one["recorded_logprobs"] for one in found] == [None, None, None]


def test_drawn_split_depends_on_the_prompt_only(make_tokenizer):
    drawing = make_tokenizer(heldout_fraction=0.25)
    prompts = [f"w{n % 97} w{n // 97}" for n in range(800)]
    rows = [row(example_id=prompt, messages=turns(prompt, "w1")) for prompt in prompts]
    splits = [one["split"] for one in usable(from_json(drawing, *rows))]
    # Four standard deviations of 800 draws.
    assert abs(splits.count("heldout") - 200) < 4 * math.sqrt(800 * 0.25 * 0.75)
    others = [
        row(example_id=n, source="teacher_cipher", correct=False, messages=turns(prompt, "w2 w3", "w4", "w"))
        for n, prompt in enumerate(prompts)
    ]
    again = usable(from_json(drawing, *others[::-1]))[::-1]
    assert [one["split"] for one in again] == splits
    assert not any(one["split_is_given"] for one in again)


def test_content_is_a_hash_of_the_prompt(make_tokenizer):
    conversations = [
        turns("w1", "w2"),
        turns("w1", "w3", "w4", "w5"),
        turns("w1 w2", "w2"),
        [message("system", "w1"), message("assistant", "w2")],
        [message("system", "w1"), *turns("w1", "w2")],
    ]
    found = usable(from_json(make_tokenizer(), *(row(messages=messages) for messages in conversations)))
    contents = [one["content"] for one in found]
    assert contents[0] == contents[1]
    assert len(set(contents)) == 4


def test_given_split_is_kept(make_tokenizer):
    rows = [row(split="train"), row(split="heldout"), row(split=""), row(split=None)]
    for fraction, drawn in ((0.999999, "heldout"), (0.0, "train")):
        found = usable(from_json(make_tokenizer(heldout_fraction=fraction), *rows))
        assert [one["split"] for one in found] == ["train", "heldout", drawn, drawn]
        assert [one["split_is_given"] for one in found] == [True, True, False, False]


def test_unprintable_characters_are_text(make_tokenizer):
    content = "w1 \0 \u2028 \U0001f600 w2"
    (found,) = usable(from_json(make_tokenizer(), row(messages=turns(content, "w3"))))
    # The line separator is a space to the tokenizer; the others are unknown words.
    assert found["prompt_ids"] == [4, 2, 2, 5]


def test_invalid_utf_8_in_a_table_rejects_only_its_row(make_tokenizer):
    ends = struct.pack("<4i", 0, 1, 3, 4)
    sources = pa.StringArray.from_buffers(3, pa.py_buffer(ends), pa.py_buffer(b"t\xff\xfec"))
    table = pa.table({"messages": [turns("w1", "w2")] * 3, "source": sources})
    found = make_tokenizer(fallback_scorer="teacher_plain").from_parquet(table).to_pylist()
    assert [one["reason"] for one in found] == [
        "",
        "the row cannot be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        "",
    ]
    assert [one["source"] for one in found] == ["t", None, "c"]


def test_arrow_types_other_than_the_schemas(make_tokenizer):
    table = pa.table(
        {
            "example_id": pa.array(np.array([3], np.uint8)),
            "messages": pa.array([turns("w1", "w2")], EXAMPLE_SCHEMA.field("messages").type),
            "source": pa.array(["teacher_plain"]).dictionary_encode(),
            "response_ids": pa.array([[5, END]], pa.large_list(pa.uint16())),
            "behavior_logprobs": pa.array([[-0.5, -0.25]], pa.list_(pa.float16(), 2)),
        }
    )
    (found,) = usable(make_tokenizer().from_parquet(table).to_pylist())
    assert (found["example_id"], found["source"]) == ("3", "teacher_plain")
    assert found["recorded_logprobs"] == [-0.5, -0.25]
