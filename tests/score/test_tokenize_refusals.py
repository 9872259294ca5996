"""Corpus rows that are no use: each says why, in full, and spoils no other."""

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


def said(role, content):
    return {"role": role, "content": content}


def turns(*contents):
    """A conversation of the user and the assistant in turn."""
    return [said(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]


def row(**changes):
    good = {
        "example_id": "a-1",
        "messages": turns("w1 w2 w3", "w4 w5"),
        "source": "tutor",
        "split": "train",
        "correct": True,
        "question": "w1 w2 w3",
        "answer": "w4 w5",
    }
    return good | changes


def of_lines(tokenize, *texts):
    places = [f"f.jsonl:{number}" for number in range(1, len(texts) + 1)]
    found = tokenize.lines(pa.table({"text": pa.array(texts, pa.binary()), "place": places}))
    assert found.schema == TOKENIZED_SCHEMA
    return found.to_pylist()


def of_json(tokenize, *rows):
    return of_lines(tokenize, *(json.dumps(row).encode() for row in rows))


def of_table(tokenize, *rows, schema=SCHEMA):
    found = tokenize.table(pa.Table.from_pylist(rows, schema))
    assert found.schema == TOKENIZED_SCHEMA
    return found.to_pylist()


def assert_only_the_middle_row_is_no_use(found, reason):
    assert [one["reason"] for one in found] == ["", reason, ""]
    assert [len(one["response_ids"]) for one in found] == [3, 0, 3]
    assert found[1]["prompt_ids"] == [] and found[1]["recorded_logprobs"] is None


NO_MODEL = (
    "expected one of [behavior]: ['coder', 'tutor'] (or set corpus.source for rows that name none,"
    " corpus.fallback_scorer for sources without a model)"
)
NO_ROLE = "expected one of system, developer, user, assistant, tool"
NO_LAST = "expected the last to be 'assistant'"
NO_IDS = "response_ids: differ from the ids of the text; expected the same"
REFUSES = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + CHAT_TEMPLATE
FORGETS = CHAT_TEMPLATE.replace(
    "message['content']", "message['content'].replace('' if loop.last else 'w9', '')"
)

# What is wrong: (changes to a good row, reason, changes to the rules); of the right types.
BAD_VALUES = {
    "no conversation": ({"messages": None}, "messages: read nothing; expected a list of messages"),
    "no messages": ({"messages": []}, f"messages: read roles []; {NO_LAST}"),
    "no answer": ({"messages": turns("w1")}, f"messages: read roles ['user']; {NO_LAST}"),
    "the user last": (
        {"messages": turns("w1", "w2", "w3")},
        f"messages: read roles ['user', 'assistant', 'user']; {NO_LAST}",
    ),
    "the assistant first": (
        {"messages": [said("assistant", "w1")]},
        "messages.0: read role 'assistant'; expected a prompt before an answer",
    ),
    "no message": (
        {"messages": [None, *turns("w1", "w2")]},
        "messages.0: read nothing; expected an object with role and content",
    ),
    "no role": ({"messages": [said(None, "w1")]}, f"messages.0.role: read None; {NO_ROLE}"),
    "unknown role": (
        {"messages": [said("user", "w1"), said("gpt", "w2")]},
        f"messages.1.role: read 'gpt'; {NO_ROLE}",
    ),
    "no content": ({"messages": turns("w1", None)}, "messages.1.content: read nothing; TEXT"),
    "an empty prompt": (
        {"messages": turns("", "w2")},
        "messages: nothing stands before the first answer; expected a prompt",
    ),
    "an empty answer": ({"messages": turns("w1", "")}, "messages.1: EMPTY"),
    "a blank answer": ({"messages": turns("w1", " \n")}, "messages.1: EMPTY"),
    "an empty answer before": ({"messages": turns("w1", "", "w2", "w3")}, "messages.1: EMPTY"),
    "no response": ({"answer": None}, "answer: is empty; expected text", HALVES),
    "an empty question": ({"question": ""}, "question: is empty; expected text", HALVES),
    "a blank response": ({"answer": " "}, "messages.1: EMPTY", HALVES),
    "no source": ({"source": None}, f"source: read None; {NO_MODEL}"),
    "an empty source": ({"source": ""}, f"source: read None; {NO_MODEL}"),
    "an unknown source": ({"source": "author"}, f"source: read 'author'; {NO_MODEL}"),
    "an unknown split": (
        {"split": "test"},
        "split: read 'test'; expected 'train', 'heldout' or nothing",
    ),
    "too long": (
        {"messages": turns("w1 w2 w3 w4 w5", "w1 w2 w3 w4 w5 w6 w7")},
        "messages: 13 tokens; expected at most generator.max_model_len 12"
        ' (or corpus.on_overlength = "truncate")',
    ),
    "a prompt that leaves no room": (
        {"messages": turns("w1 " * 12, "w2")},
        "messages: 12 tokens before the first answer; expected fewer than"
        " generator.max_model_len 12",
        {"truncates": True},
    ),
    "other ids": ({"response_ids": [7, 8, 2]}, NO_IDS),
    "ids without an end": ({"response_ids": [7, 8]}, NO_IDS),
    "no ids at all": ({"response_ids": []}, NO_IDS),
    "log-probs of fewer tokens": (
        {"behavior_logprobs": [-1.0, -1.0]},
        "behavior_logprobs: read 2; expected one for each of the 3 response tokens",
    ),
    **{
        f"{value} for a log-prob": (
            {"behavior_logprobs": [-1.0, value, -1.0]},
            f"behavior_logprobs.1: read {value}; expected a finite log-prob",
        )
        for value in (math.nan, math.inf, -math.inf, 0.5)
    },
    "a token that a model does not know": (
        {"messages": turns("w1", "w7")},
        "messages: token id 10 is outside the vocabulary; expected ids below 10, the embeddings of"
        " every model of the job",
        {"num_embeddings": 10},
    ),
    "a template that refuses": (
        {"messages": [said("system", "w1"), *turns("w2", "w3")]},
        "messages: the chat template refuses them: no system",
        {"template": REFUSES},
    ),
    "a template that forgets": (
        {"messages": turns("w1", "w9 w2", "w3", "w4")},
        "messages.1: the chat template does not keep the tokens before and of this answer when more"
        " follows; expected the ids that its author saw and wrote",
        {"template": FORGETS},
    ),
}
# The same, of types that no column of a good row has.
BAD_TYPES = {
    "text for messages": ({"messages": "w1"}, "messages: read text; expected a list of messages"),
    "an object for messages": (
        {"messages": said("user", "w1")},
        "messages: read an object; expected a list of messages",
    ),
    "text for a message": (
        {"messages": ["w1", "w2"]},
        "messages.0: read text; expected an object with role and content",
    ),
    "other keys": ({"messages": [{"from": "user"}]}, f"messages.0.role: read None; {NO_ROLE}"),
    "a number for a role": ({"messages": [said(3, "w1")]}, f"messages.0.role: read 3; {NO_ROLE}"),
    "a number for content": (
        {"messages": [said("user", 3)]},
        "messages.0.content: read a number; TEXT",
    ),
    "parts for content": (
        {"messages": [said("user", [{"type": "text", "text": "w1"}])]},
        "messages.0.content: read a list; TEXT",
    ),
    "a number for an answer": ({"answer": 3}, "answer: read a number; TEXT", HALVES),
    "a list for a question": ({"question": ["w1"]}, "question: read a list; TEXT", HALVES),
    "a number for a source": ({"source": 3}, "source: read a number; TEXT"),
    "a number for a split": ({"split": 1}, "split: read a number; TEXT"),
    **{
        f"{value} for a name": (
            {"example_id": value},
            f"example_id: read {kind}; expected text or a whole number",
        )
        for value, kind in ((0.5, "a number"), (True, "true or false"), (("a",), "a list"))
    },
    **{
        f"{value!r} for right": (
            {"correct": value},
            f"correct: read {value!r}; expected true, false or nothing",
        )
        for value in ("yes", 1)
    },
    **{
        f"{value} for ids": (
            {"response_ids": value},
            f"response_ids: read {kind}; expected a list of ints",
        )
        for value, kind in (("7 8 1", "text"), ([7.0, 8.0, 1.0], "a list"), ([True], "a list"))
    },
    **{
        f"{value} for log-probs": (
            {"behavior_logprobs": value},
            f"behavior_logprobs: read {kind}; expected a list of floats",
        )
        for value, kind in (("-1", "text"), (-1, "a number"), (["-1"], "a list"))
    },
    "more than float32 holds": (
        {"behavior_logprobs": [-1e300, -1.0, -1.0]},
        "behavior_logprobs.0: read -1e+300; expected a finite log-prob",
    ),
}
HALF = "'utf-8' codec can't encode character '\\ud83d' in position 3: surrogates not allowed"
# Lines that no table holds: (line, reason).
BAD_LINES = {
    "an object of nothing": (b"{}", "messages: read nothing; expected a list of messages"),
    "no JSON": (b"w1 w2", "f.jsonl:2: is not JSON: Expecting value: line 1 column 1 (char 0)"),
    "half a line": (
        b'{"source": "tu',
        "f.jsonl:2: is not JSON: Unterminated string starting at: line 1 column 12 (char 11)",
    ),
    "no UTF-8": (
        b'{"source": "\xff"}',
        "f.jsonl:2: is not JSON: 'utf-8' codec can't decode byte 0xff in position 12:"
        " invalid start byte",
    ),
    **{
        f"{text} for a row": (text, f"the row is {kind}; expected an object with named values")
        for text, kind in ((b"[]", "a list"), (b"3", "a number"), (b"null", "nothing"))
    },
    "a deep list": (
        b"[" * 100_000,
        "f.jsonl:2: is not JSON: maximum recursion depth exceeded while decoding a JSON array from"
        " a unicode string",
    ),
    "text among messages": (
        json.dumps(row(messages=[*turns("w1", "w2"), "w3"])).encode(),
        "messages.2: read text; expected an object with role and content",
    ),
    **{
        f"half a character in {name}": (
            json.dumps(row(**changes)).encode(),
            f"{name}: is not Unicode: {HALF}",
        )
        for name, changes in {
            "example_id": {"example_id": "a-1\ud83d"},
            "source": {"source": "new\ud83d"},
            "split": {"split": "one\ud83d"},
            "messages.1.content": {"messages": turns("w1", "w2 \ud83d")},
        }.items()
    },
    "half a character, undecoded": (
        json.dumps(row(source="new\ud83d"), ensure_ascii=False).encode(errors="surrogatepass"),
        f"source: is not Unicode: {HALF}",
    ),
    "a log-prob of many digits": (
        json.dumps(row(behavior_logprobs=[10**400, -1, -1])).encode(),
        f"behavior_logprobs.0: read {10**400}; expected a finite log-prob",
    ),
    "an id of many digits": (json.dumps(row(response_ids=[10**400, 8, 1])).encode(), NO_IDS),
}


def spelt_out(changes, reason, rules=None):
    reason = reason.replace("EMPTY", "the assistant's answer is empty")
    return changes, reason.replace("TEXT", "expected text"), rules or {}


@pytest.mark.parametrize("bad", (BAD_VALUES | BAD_TYPES).values(), ids=BAD_VALUES | BAD_TYPES)
def test_a_bad_row_of_json_says_why_and_spoils_no_other(making, bad):
    changes, reason, rules = spelt_out(*bad)
    found = of_json(making(**rules), row(), row(**changes), row())
    assert_only_the_middle_row_is_no_use(found, reason)


@pytest.mark.parametrize("bad", BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_bad_row_of_a_table_says_why_and_spoils_no_other(making, bad):
    changes, reason, rules = spelt_out(*bad)
    found = of_table(making(**rules), row(), row(**changes), row())
    assert_only_the_middle_row_is_no_use(found, reason)


@pytest.mark.parametrize("bad", BAD_TYPES.values(), ids=BAD_TYPES)
def test_a_column_of_another_type_says_why_in_each_row(making, bad):
    changes, reason, rules = spelt_out(*bad)
    found = of_table(making(**rules), row(**changes), row(**changes), schema=None)
    assert [one["reason"] for one in found] == [reason, reason]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_says_why_and_spoils_no_other(making, line, reason):
    good = json.dumps(row()).encode()
    found = of_lines(making(), good, line, good)
    assert_only_the_middle_row_is_no_use(found, reason)
