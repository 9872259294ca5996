"""Corpus rows that are rejected, each with a reason, and without effect on other rows."""

from __future__ import annotations

import json
import math

import pyarrow as pa
import pytest

from pear_ray.config import Columns
from pear_ray.records import EXAMPLE_SCHEMA, TOKENIZED_SCHEMA
from pear_ray.train.new_model import CHAT_TEMPLATE

HALVES = {"columns": Columns(prompt="question", response="answer")}
SCHEMA = pa.schema([*EXAMPLE_SCHEMA, ("question", pa.string()), ("answer", pa.string())])


def message(role, content):
    return {"role": role, "content": content}


def turns(*contents):
    """A conversation of the user and the assistant in turn."""
    return [message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]


def row(**changes):
    good = {
        "example_id": "a-1",
        "messages": turns("w1 w2 w3", "w4 w5"),
        "source": "teacher_plain",
        "split": "train",
        "correct": True,
        "question": "w1 w2 w3",
        "answer": "w4 w5",
    }
    return good | changes


def from_lines(tokenize, *texts):
    places = [f"f.jsonl:{number}" for number in range(1, len(texts) + 1)]
    found = tokenize.from_json_lines(pa.table({"text": pa.array(texts, pa.binary()), "place": places}))
    assert found.schema == TOKENIZED_SCHEMA
    return found.to_pylist()


def from_json(tokenize, *rows):
    return from_lines(tokenize, *(json.dumps(row).encode() for row in rows))


def from_parquet(tokenize, *rows, schema=SCHEMA):
    found = tokenize.from_parquet(pa.Table.from_pylist(rows, schema))
    assert found.schema == TOKENIZED_SCHEMA
    return found.to_pylist()


def assert_middle_row_is_rejected(found, reason):
    assert [one["reason"] for one in found] == ["", reason, ""]
    assert [len(one["response_ids"]) for one in found] == [3, 0, 3]
    assert found[1]["prompt_ids"] == [] and found[1]["recorded_logprobs"] is None


NO_SOURCE = "expected an entry of [behavior], ['teacher_cipher', 'teacher_plain'], got {} (corpus.source is the"
NO_SOURCE += " default, corpus.fallback_scorer scores sources without a model)"
ROLES = "expected one of system, developer, user, assistant, tool, got"
LAST = "messages: expected 'assistant' as the last role, got"
LIST = "expected a list of messages, got"
OBJECT = "expected an object, got"
TEXT = "expected text, got"
LOGPROB = "expected a finite log-prob, got"
EMPTY = "messages.1: expected an answer, got an empty one"
OTHER_IDS = "response_ids: expected the ids of the text, got others"
REJECTS = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + CHAT_TEMPLATE
FORGETS = CHAT_TEMPLATE.replace("message['content']", "message['content'].replace('' if loop.last else 'w9', '')")

# Name of the mistake: (changes to a good row, reason, changes to the config); of the right types.
BAD_VALUES = {
    "no conversation": ({"messages": None}, f"messages: {LIST} nothing"),
    "no messages": ({"messages": []}, f"{LAST} []"),
    "no answer": ({"messages": turns("w1")}, f"{LAST} ['user']"),
    "user last": ({"messages": turns("w1", "w2", "w3")}, f"{LAST} ['user', 'assistant', 'user']"),
    "assistant first": (
        {"messages": [message("assistant", "w1")]},
        "messages.0: expected a prompt before an answer, got role 'assistant'",
    ),
    "no message": ({"messages": [None, *turns("w1", "w2")]}, f"messages.0: {OBJECT} nothing"),
    "no role": ({"messages": [message(None, "w1")]}, f"messages.0.role: {ROLES} None"),
    "unknown role": ({"messages": [message("user", "w1"), message("gpt", "w2")]}, f"messages.1.role: {ROLES} 'gpt'"),
    "no content": ({"messages": turns("w1", None)}, f"messages.1.content: {TEXT} nothing"),
    "empty prompt": ({"messages": turns("", "w2")}, "messages: expected a prompt before the first answer, got none"),
    "empty answer": ({"messages": turns("w1", "")}, EMPTY),
    "blank answer": ({"messages": turns("w1", " \n")}, EMPTY),
    "empty earlier answer": ({"messages": turns("w1", "", "w2", "w3")}, EMPTY),
    "no response": ({"answer": None}, f"answer: {TEXT} none", HALVES),
    "empty question": ({"question": ""}, f"question: {TEXT} none", HALVES),
    "blank response": ({"answer": " "}, EMPTY, HALVES),
    "no source": ({"source": None}, f"source: {NO_SOURCE.format(None)}"),
    "empty source": ({"source": ""}, f"source: {NO_SOURCE.format(None)}"),
    "unknown source": ({"source": "author"}, "source: " + NO_SOURCE.format("'author'")),
    "unknown split": ({"split": "test"}, "split: expected 'train', 'heldout' or nothing, got 'test'"),
    "too long": (
        {"messages": turns("w1 w2 w3 w4 w5", "w1 w2 w3 w4 w5 w6 w7")},
        "messages: expected at most generator.max_model_len = 12 tokens, got 13"
        ' (corpus.on_overlength = "truncate" cuts them)',
    ),
    "too long a prompt": (
        {"messages": turns("w1 " * 12, "w2")},
        "messages: expected fewer than generator.max_model_len = 12 tokens before the first answer, got 12",
        {"on_overlength": "truncate"},
    ),
    "other ids": ({"response_ids": [7, 8, 2]}, OTHER_IDS),
    "ids without an end": ({"response_ids": [7, 8]}, OTHER_IDS),
    "no ids": ({"response_ids": []}, OTHER_IDS),
    "too few log-probs": (
        {"behavior_logprobs": [-1.0, -1.0]},
        "behavior_logprobs: expected one value per response token, 3, got 2",
    ),
    **{
        f"log-prob {value}": ({"behavior_logprobs": [-1.0, value, -1.0]}, f"behavior_logprobs.1: {LOGPROB} {value}")
        for value in (math.nan, math.inf, -math.inf, 0.5)
    },
    "unknown token": (
        {"messages": turns("w1", "w7")},
        "messages: expected token ids below 10, the embeddings of the job's models, got 10",
        {"num_embeddings": 10},
    ),
    "rejected by the template": (
        {"messages": [message("system", "w1"), *turns("w2", "w3")]},
        "messages: rejected by the chat template: no system",
        {"template": REJECTS},
    ),
    "changed by the template": (
        {"messages": turns("w1", "w9 w2", "w3", "w4")},
        "messages.1: expected a chat template that keeps the tokens up to this answer when more"
        " turns follow, got different ones",
        {"template": FORGETS},
    ),
}
# The same, of types that no column of a good row has.
BAD_TYPES = {
    "text for messages": ({"messages": "w1"}, f"messages: {LIST} text"),
    "object for messages": ({"messages": message("user", "w1")}, f"messages: {LIST} an object"),
    "text for a message": ({"messages": ["w1", "w2"]}, f"messages.0: {OBJECT} text"),
    "other keys": ({"messages": [{"from": "user"}]}, f"messages.0.role: {ROLES} None"),
    "number for a role": ({"messages": [message(3, "w1")]}, f"messages.0.role: {ROLES} 3"),
    "number for content": ({"messages": [message("user", 3)]}, f"messages.0.content: {TEXT} a number"),
    "parts for content": (
        {"messages": [message("user", [{"type": "text", "text": "w1"}])]},
        f"messages.0.content: {TEXT} a list",
    ),
    "number for an answer": ({"answer": 3}, f"answer: {TEXT} a number", HALVES),
    "list for a question": ({"question": ["w1"]}, f"question: {TEXT} a list", HALVES),
    "number for a source": ({"source": 3}, f"source: {TEXT} a number"),
    "number for a split": ({"split": 1}, f"split: {TEXT} a number"),
    **{
        f"id {value}": ({"example_id": value}, f"example_id: expected text or an integer, got {kind}")
        for value, kind in ((0.5, "a number"), (True, "a boolean"), (("a",), "a list"))
    },
    **{
        f"{value!r} for correct": ({"correct": value}, f"correct: expected true, false or nothing, got {value!r}")
        for value in ("yes", 1)
    },
    **{
        f"{value} for ids": ({"response_ids": value}, f"response_ids: expected a list of ints, got {kind}")
        for value, kind in (("7 8 1", "text"), ([7.0, 8.0, 1.0], "a list"), ([True], "a list"))
    },
    **{
        f"{value} for log-probs": (
            {"behavior_logprobs": value},
            f"behavior_logprobs: expected a list of floats, got {kind}",
        )
        for value, kind in (("-1", "text"), (-1, "a number"), (["-1"], "a list"))
    },
    "below float32": ({"behavior_logprobs": [-1e300, -1.0, -1.0]}, f"behavior_logprobs.0: {LOGPROB} -1e+300"),
}
SURROGATE = "'utf-8' codec can't encode character '\\ud83d' in position 3: surrogates not allowed"
# Lines that no table holds: (line, reason).
BAD_LINES = {
    "empty object": (b"{}", f"messages: {LIST} nothing"),
    "no JSON": (b"w1 w2", "f.jsonl:2: expected JSON: Expecting value: line 1 column 1 (char 0)"),
    "truncated line": (
        b'{"source": "tu',
        "f.jsonl:2: expected JSON: Unterminated string starting at: line 1 column 12 (char 11)",
    ),
    "no UTF-8": (
        b'{"source": "\xff"}',
        "f.jsonl:2: expected JSON: 'utf-8' codec can't decode byte 0xff in position 12: invalid start byte",
    ),
    **{
        f"{text} for a row": (text, f"expected an object with named values, got {kind}")
        for text, kind in ((b"[]", "a list"), (b"3", "a number"), (b"null", "nothing"))
    },
    "deep list": (
        b"[" * 100_000,
        "f.jsonl:2: expected JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string",
    ),
    "text among messages": (
        json.dumps(row(messages=[*turns("w1", "w2"), "w3"])).encode(),
        f"messages.2: {OBJECT} text",
    ),
    **{
        f"lone surrogate in {name}": (
            json.dumps(row(**changes)).encode(),
            f"{name}: expected Unicode text: {SURROGATE}",
        )
        for name, changes in {
            "example_id": {"example_id": "a-1\ud83d"},
            "source": {"source": "new\ud83d"},
            "split": {"split": "one\ud83d"},
            "messages.1.content": {"messages": turns("w1", "w2 \ud83d")},
        }.items()
    },
    "lone surrogate, undecoded": (
        json.dumps(row(source="new\ud83d"), ensure_ascii=False).encode(errors="surrogatepass"),
        f"source: expected Unicode text: {SURROGATE}",
    ),
    "log-prob of many digits": (
        json.dumps(row(behavior_logprobs=[10**400, -1, -1])).encode(),
        f"behavior_logprobs.0: {LOGPROB} {10**400}",
    ),
    "id of many digits": (json.dumps(row(response_ids=[10**400, 8, 1])).encode(), OTHER_IDS),
}


def unpack(changes, reason, config=None):
    return changes, reason, config or {}


@pytest.mark.parametrize("bad", (BAD_VALUES | BAD_TYPES).values(), ids=BAD_VALUES | BAD_TYPES)
def test_bad_json_row_is_rejected_alone(make_tokenizer, bad):
    changes, reason, config = unpack(*bad)
    found = from_json(make_tokenizer(**config), row(), row(**changes), row())
    assert_middle_row_is_rejected(found, reason)


@pytest.mark.parametrize("bad", BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_parquet_row_is_rejected_alone(make_tokenizer, bad):
    changes, reason, config = unpack(*bad)
    found = from_parquet(make_tokenizer(**config), row(), row(**changes), row())
    assert_middle_row_is_rejected(found, reason)


@pytest.mark.parametrize("bad", BAD_TYPES.values(), ids=BAD_TYPES)
def test_column_of_another_type_rejects_each_row(make_tokenizer, bad):
    changes, reason, config = unpack(*bad)
    found = from_parquet(make_tokenizer(**config), row(**changes), row(**changes), schema=None)
    assert [one["reason"] for one in found] == [reason, reason]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_rejected_alone(make_tokenizer, line, reason):
    good = json.dumps(row()).encode()
    found = from_lines(make_tokenizer(), good, line, good)
    assert_middle_row_is_rejected(found, reason)
