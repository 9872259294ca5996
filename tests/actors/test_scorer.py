"""Corpus rows as tokens, and the reason why a row is no use."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pear_ray.actors.scorer import TOKENISED_SCHEMA, Tokenise
from pear_ray.engines.tokenizer import digests, load_tokenizer
from pear_ray.records import EXAMPLE_SCHEMA

MAX_MODEL_LEN = 12


@pytest.fixture
def path(tiny_model):
    return str(tiny_model(False))


def row(**changes):
    good = {
        "example_id": "a-1",
        "messages": conversation("w1 w2 w3", "w4 w5"),
        "source": "tutor",
        "split": "train",
        "correct": True,
        "response_ids": None,
        "behaviour_logprobs": None,
    }
    return good | changes


def conversation(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def tokenised(path, rows, heldout_fraction=0.0):
    tokenise = Tokenise(path, frozenset({"tutor", "coder"}), MAX_MODEL_LEN, heldout_fraction)
    table = tokenise(pa.Table.from_pylist(rows, EXAMPLE_SCHEMA))
    assert table.schema == TOKENISED_SCHEMA
    return table.to_pylist()


def test_a_good_row_becomes_ids_and_keeps_its_facts(path):
    tokenizer = load_tokenizer(path)
    response = [*tokenizer.convert_tokens_to_ids(["w4", "w5"]), tokenizer.eos_token_id]
    recorded = [-0.5, -0.25, -0.125]
    (found,) = tokenised(path, [row(response_ids=response, behaviour_logprobs=recorded)])
    vocabulary, template = digests(tokenizer)
    assert found == {
        "example_id": "a-1",
        "source": "tutor",
        "split": "train",
        "correct": True,
        "tokenizer_digest": vocabulary,
        "template_digest": template,
        "prompt_ids": tokenizer.convert_tokens_to_ids(["w1", "w2", "w3"]),
        "response_ids": response,
        "recorded_logprobs": recorded,
        "reason": "",
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"messages": conversation("w1", "w2")[:1]},
            "messages: read roles ['user']; expected the last to be 'assistant'",
        ),
        ({"messages": []}, "messages: read roles []; expected the last to be 'assistant'"),
        ({"messages": None}, "messages: read roles []; expected the last to be 'assistant'"),
        (
            {"messages": conversation("w1", None)},
            "messages: read a message without text; expected `content` in each",
        ),
        ({"messages": conversation("w1", " ")}, "the assistant's answer is empty"),
        (
            {"source": "author"},
            "source: read 'author'; expected one of [behaviour]: ['coder', 'tutor']",
        ),
        ({"source": None}, "source: read None; expected one of [behaviour]: ['coder', 'tutor']"),
        ({"example_id": ""}, "example_id: read none; expected a name of its own for each row"),
        ({"example_id": None}, "example_id: read none; expected a name of its own for each row"),
        (
            {"messages": conversation("w1 w2 w3 w4 w5", "w1 w2 w3 w4 w5 w6")},
            "messages: 12 tokens; expected fewer than generator.max_model_len 12",
        ),
        (
            {"response_ids": [3, 4, 1], "behaviour_logprobs": [-1.0, -1.0, -1.0]},
            "response_ids: differ from the ids of the text; expected the same",
        ),
        (
            {"behaviour_logprobs": [-1.0, -1.0]},
            "behaviour_logprobs: read 2; expected one for each of the 3 response tokens",
        ),
        ({"response_ids": []}, "response_ids: differ from the ids of the text; expected the same"),
    ],
)
def test_a_bad_row_says_why_and_spoils_no_other(path, changes, reason):
    rows = tokenised(path, [row(example_id="a-0"), row(**changes), row(example_id="a-2")])
    assert [found["reason"] for found in rows] == ["", reason, ""]
    assert rows[1]["prompt_ids"] == rows[1]["response_ids"] == []
    assert rows[0]["response_ids"] == rows[2]["response_ids"] != []


def test_a_row_as_long_as_fits_is_kept(path):
    messages = conversation("w1 w2 w3 w4 w5", "w1 w2 w3 w4 w5")
    (found,) = tokenised(path, [row(messages=messages)])
    assert found["reason"] == ""
    assert len(found["prompt_ids"] + found["response_ids"]) == MAX_MODEL_LEN - 1


def test_a_missing_split_is_drawn_from_the_id_and_a_given_one_is_kept(path):
    names = [f"a-{number}" for number in range(400)]
    rows = tokenised(path, [row(example_id=name, split=None) for name in names], 0.25)
    heldout = {found["example_id"] for found in rows if found["split"] == "heldout"}
    assert {found["split"] for found in rows} == {"train", "heldout"}
    assert 60 < len(heldout) < 140
    # Neither the order nor the other rows matter.
    again = tokenised(path, [row(example_id=name, split=None) for name in names[:9:-1]], 0.25)
    assert {f["example_id"] for f in again if f["split"] == "heldout"} == heldout - set(names[:10])
    given = tokenised(path, [row(example_id=name, split="train") for name in names], 1.0)
    assert {found["split"] for found in given} == {"train"}
