"""What good corpus rows become: token ids, whose they are, and which the assistant wrote."""

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
ASKED = st.lists(st.tuples(st.sampled_from(["user", "system", "tool"]), WORDS), min_size=1)
LONG = {"max_model_len": 1000}


def ids(words):
    """Token ids by the order of the tiny model's vocabulary: three special tokens, then w0."""
    return [int(word[1:]) + 3 for word in words.split()]


def said(role, content):
    return {"role": role, "content": content}


def turns(*contents):
    """A conversation of the user and the assistant in turn."""
    return [said(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]


def row(**changes):
    good = {"example_id": "a-1", "messages": turns("w1 w2 w3", "w4 w5"), "source": "tutor"}
    return good | changes


def of_json(tokenize, *rows):
    places = [f"f.jsonl:{number}" for number in range(1, len(rows) + 1)]
    texts = pa.array([json.dumps(row).encode() for row in rows], pa.binary())
    found = tokenize.lines(pa.table({"text": texts, "place": places}))
    assert found.schema == TOKENIZED_SCHEMA
    return found.to_pylist()


def of_table(tokenize, *rows, schema=EXAMPLE_SCHEMA):
    found = tokenize.table(pa.Table.from_pylist(rows, schema))
    assert found.schema == TOKENIZED_SCHEMA
    return found.to_pylist()


def usable(found):
    """The rows, all of them good."""
    assert {one["reason"] for one in found} <= {""}
    return found


@pytest.mark.parametrize("read", [of_json, of_table])
def test_a_good_row_becomes_ids_and_keeps_its_facts(making, read):
    recorded = [-0.5, 0.0, -0.125]
    given_row = row(
        split="heldout", correct=True, response_ids=[7, 8, END], behavior_logprobs=recorded
    )
    (found,) = read(making(), given_row)
    assert -(2**63) <= found.pop("content") < 2**63
    assert len(bytes.fromhex(found.pop("digest"))) == 8
    assert found == {
        "example_id": "a-1",
        "source": "tutor",
        "scorer": "tutor",
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


def test_a_row_of_a_conversation_and_a_source_alone_will_do(making):
    bare = {"messages": turns("w1", "w2"), "source": "coder"}
    (found,) = usable(of_json(making(), bare))
    assert (found["prompt_ids"], found["response_ids"]) == ([4], [5, END])
    assert (found["split"], found["split_is_given"], found["correct"]) == ("train", False, None)
    assert found["recorded_logprobs"] is None


@pytest.mark.parametrize("read", [of_json, of_table])
def test_no_rows_become_no_rows(making, read):
    assert read(making()) == []


@pytest.mark.parametrize(("name", "expected"), [("a-7", "a-7"), (17, "17"), ("\0", "\0")])
def test_a_row_keeps_its_own_name(making, name, expected):
    for read in (of_json, lambda *words: of_table(*words, schema=None)):
        (found,) = usable(read(making(), row(example_id=name)))
        assert found["example_id"] == expected


def test_a_row_without_a_name_is_named_after_its_content(making):
    unnamed = row(example_id=None, correct=True)
    reversed_messages = [dict([*message.items()][::-1]) for message in unnamed["messages"]]
    shuffled = {"source": "tutor", "example_id": "", "messages": reversed_messages}
    others = [
        row(example_id=None, source="coder"),
        row(example_id=None, messages=turns("w1 w2 w3", "w4 w6")),
        row(example_id=None, messages=turns("w1 w2", "w4 w5")),
    ]
    found = usable(of_json(making(), *others, shuffled, unnamed))
    assert found[3]["example_id"] == found[4]["example_id"]
    assert len({one["example_id"] for one in found}) == 4
    assert found[4]["example_id"] == of_table(making(), unnamed)[0]["example_id"]
    # The same in every version and on every machine: rows are stored by it.
    content = b"""["tutor", [{"content": "w1 w2 w3", "role": "user"}, """
    content += b"""{"content": "w4 w5", "role": "assistant"}]]"""
    assert found[4]["example_id"] == hashlib.sha256(content).hexdigest()[:16]


def test_a_row_without_a_name_that_is_no_use_goes_by_its_place_or_content(making):
    rows = (row(example_id=None, source="x"), row(example_id=None, source="y"))
    found = of_json(making(), *rows)
    assert [one["example_id"] for one in found] == ["f.jsonl:1", "f.jsonl:2"]
    found = of_table(making(), *rows)
    assert [one["example_id"] for one in found] == [one["digest"] for one in found]
    assert found[0]["digest"] != found[1]["digest"]


def test_columns_go_by_the_names_that_the_job_gives_them(making):
    names = {name: f"their {name}" for name in Columns().model_dump() if name not in HALVES}
    whole = row(split="train", correct=False, response_ids=[7, 8, END], behavior_logprobs=[0] * 3)
    theirs = {names[name]: value for name, value in whole.items()}
    (expected,) = usable(of_json(making(), whole))
    (found,) = usable(of_json(making(columns=Columns(**names)), theirs))
    assert found | {"digest": ""} == expected | {"digest": ""}
    (found,) = of_json(making(columns=Columns(**names)), theirs | {"their split": "test"})
    assert found["reason"].startswith("their split: read 'test'")


def test_a_question_and_its_answer_are_a_conversation(making):
    halves = {"example_id": "a-1", "source": "tutor", "question": "w1 w2 w3", "answer": "w4 w5"}
    (expected,) = usable(of_json(making(), row()))
    halved = making(columns=Columns(**HALVES))
    for read in (of_json, lambda *words: of_table(*words, schema=None)):
        (found,) = usable(read(halved, halves | {"messages": "not asked for"}))
        assert found | {"digest": ""} == expected | {"digest": ""}


def test_a_default_source_is_that_of_rows_that_name_none(making):
    rows = (row(source=None), row(source=""), row(source="coder"))
    found = usable(of_json(making(source="tutor"), *rows))
    assert [one["source"] for one in found] == ["tutor", "tutor", "coder"]
    assert [one["scorer"] for one in found] == ["tutor", "tutor", "coder"]


def test_a_reference_scores_rows_of_strangers_and_trusts_nothing_they_bring(making):
    brought = {"behavior_logprobs": [-1.0, -1.0, -1.0]}
    rows = (row(source="web", **brought), row(source="coder", **brought))
    found = usable(of_json(making(fallback_scorer="tutor"), *rows))
    assert [one["source"] for one in found] == ["web", "coder"]
    assert [one["scorer"] for one in found] == ["tutor", "coder"]
    assert [one["recorded_logprobs"] for one in found] == [None, [-1.0, -1.0, -1.0]]
    # Even a reference does not say who wrote a row that names nobody.
    (found,) = of_json(making(fallback_scorer="tutor"), row(source=None))
    assert found["reason"].startswith("source: read None; expected one of [behavior]")


@pytest.mark.parametrize("truncates", [False, True])
def test_a_row_as_long_as_the_models_context_is_kept_whole(making, truncates):
    exact = row(messages=turns("w1 w2 w3 w4 w5", "w1 w2 w3 w4 w5 w6"))
    (found,) = usable(of_json(making(truncates=truncates), exact))
    assert len(found["prompt_ids"] + found["response_ids"]) == 12
    assert found["response_ids"][-1] == END and not found["truncated"]


@settings(deadline=None)
@given(limit=st.integers(3, 12), has_more=st.booleans())
def test_a_row_that_is_cut_short_is_cut_in_all_its_parts_alike(making, limit, has_more):
    messages = turns("w1 w2", "w3 w4", "w5", "w6 w7")[: 4 if has_more else 2]
    num_response = 7 if has_more else 3
    long = row(messages=messages, behavior_logprobs=[-n / 8 for n in range(num_response)])
    (whole,) = usable(of_json(making(), long))
    (found,) = usable(of_json(making(max_model_len=limit, truncates=True), long))
    num_kept = min(num_response, limit - 2)
    assert found["truncated"] == (num_kept < num_response)
    assert found["prompt_ids"] == whole["prompt_ids"]
    assert found["response_ids"] == whole["response_ids"][:num_kept]
    assert found["recorded_logprobs"] == whole["recorded_logprobs"][:num_kept]
    expected = [True, True, True, False, True, True, True][:num_kept]
    assert (found["trainable"] or [True] * num_kept) == expected


def test_recorded_ids_are_compared_before_a_row_is_cut_short(making):
    cut = making(max_model_len=5, truncates=True)
    rows = (row(response_ids=[7, 8, END]), row(response_ids=[7, 8]))
    found = of_json(cut, *rows)
    assert [one["response_ids"] for one in found] == [[7, 8], []]
    assert found[1]["reason"].startswith("response_ids: differ")


@settings(max_examples=50, deadline=None)
@given(rounds=st.lists(st.tuples(ASKED, WORDS), min_size=1, max_size=3))
def test_the_assistants_tokens_and_its_ends_are_trained_on_and_no_others(making, rounds):
    messages, expected, first = [], [], None
    for asked, answer in rounds:
        for role, content in asked:
            messages.append(said(role, content))
            expected += [(token, False) for token in ids(content)]
        first = len(expected) if first is None else first
        messages.append(said("assistant", answer))
        expected += [(token, True) for token in [*ids(answer), END]]
    (found,) = usable(of_json(making(**LONG), row(messages=messages)))
    assert found["prompt_ids"] == [token for token, _ in expected[:first]]
    assert found["response_ids"] == [token for token, _ in expected[first:]]
    own = [is_own for _, is_own in expected[first:]]
    assert found["trainable"] == (None if all(own) else own)


def test_recorded_logprobs_of_others_tokens_count_as_nothing(making):
    messages = turns("w1", "w2", "w3 w4", "w5")
    recorded = [-1.0, -2.0, math.nan, 7.0, -3.0, -4.0]
    (found,) = usable(of_json(making(), row(messages=messages, behavior_logprobs=recorded)))
    assert found["trainable"] == [True, True, False, False, True, True]
    assert found["recorded_logprobs"] == [-1.0, -2.0, 0.0, 0.0, -3.0, -4.0]


def test_recorded_logprobs_may_be_whole_numbers_or_a_little_above_0(making):
    recorded = [-(2**24) - 1, 0, 0.0009765625]
    (found,) = usable(of_json(making(), row(behavior_logprobs=recorded)))
    assert found["recorded_logprobs"] == [-(2.0**24), 0.0, 0.0009765625]


def test_recorded_logprobs_are_left_out_where_the_job_ignores_them(making):
    # Then it does not matter either whether they are any good.
    recorded = [[-1.0, -1.0, -1.0], [math.nan], [10**400]]
    rows = [row(behavior_logprobs=values) for values in recorded]
    found = usable(of_json(making(keeps_recorded=False), *rows))
    assert [one["recorded_logprobs"] for one in found] == [None, None, None]


def test_a_drawn_split_depends_on_the_prompt_alone_and_takes_about_its_share(making):
    drawing = making(heldout_fraction=0.25)
    prompts = [f"w{n % 97} w{n // 97}" for n in range(800)]
    rows = [row(example_id=prompt, messages=turns(prompt, "w1")) for prompt in prompts]
    splits = [one["split"] for one in usable(of_json(drawing, *rows))]
    # Four standard deviations of 800 draws.
    assert abs(splits.count("heldout") - 200) < 4 * math.sqrt(800 * 0.25 * 0.75)
    others = [
        row(example_id=n, source="coder", correct=False, messages=turns(prompt, "w2 w3", "w4", "w"))
        for n, prompt in enumerate(prompts)
    ]
    again = usable(of_json(drawing, *others[::-1]))[::-1]
    assert [one["split"] for one in again] == splits
    assert not any(one["split_is_given"] for one in again)


def test_the_content_of_a_row_is_that_of_its_prompt(making):
    conversations = [
        turns("w1", "w2"),
        turns("w1", "w3", "w4", "w5"),
        turns("w1 w2", "w2"),
        [said("system", "w1"), said("assistant", "w2")],
        [said("system", "w1"), *turns("w1", "w2")],
    ]
    found = usable(of_json(making(), *(row(messages=messages) for messages in conversations)))
    contents = [one["content"] for one in found]
    assert contents[0] == contents[1]
    assert len(set(contents)) == 4


def test_a_given_split_is_kept(making):
    rows = [row(split="train"), row(split="heldout"), row(split=""), row(split=None)]
    for fraction, drawn in ((0.999999, "heldout"), (0.0, "train")):
        found = usable(of_json(making(heldout_fraction=fraction), *rows))
        assert [one["split"] for one in found] == ["train", "heldout", drawn, drawn]
        assert [one["split_is_given"] for one in found] == [True, True, False, False]


def test_characters_that_no_terminal_shows_are_text(making):
    content = "w1 \0 \u2028 \U0001f600 w2"
    (found,) = usable(of_json(making(), row(messages=turns(content, "w3"))))
    # The line separator is a space to the tokenizer; the others are unknown words.
    assert found["prompt_ids"] == [4, 2, 2, 5]


def test_text_of_a_table_that_is_not_utf_8_spoils_no_other_row(making):
    ends = struct.pack("<4i", 0, 1, 3, 4)
    sources = pa.StringArray.from_buffers(3, pa.py_buffer(ends), pa.py_buffer(b"t\xff\xfec"))
    table = pa.table({"messages": [turns("w1", "w2")] * 3, "source": sources})
    found = making(fallback_scorer="tutor").table(table).to_pylist()
    assert [one["reason"] for one in found] == [
        "",
        "the row cannot be read: 'utf-8' codec can't decode byte 0xff in position 0:"
        " invalid start byte",
        "",
    ]
    assert [one["source"] for one in found] == ["t", None, "c"]


def test_values_that_a_table_holds_as_numpy_would_are_read_as_they_are(making):
    table = pa.table(
        {
            "example_id": pa.array(np.array([3], np.uint8)),
            "messages": pa.array([turns("w1", "w2")], EXAMPLE_SCHEMA.field("messages").type),
            "source": pa.array(["tutor"]).dictionary_encode(),
            "response_ids": pa.array([[5, END]], pa.large_list(pa.uint16())),
            "behavior_logprobs": pa.array([[-0.5, -0.25]], pa.list_(pa.float16(), 2)),
        }
    )
    (found,) = usable(making().table(table).to_pylist())
    assert (found["example_id"], found["source"]) == ("3", "tutor")
    assert found["recorded_logprobs"] == [-0.5, -0.25]
