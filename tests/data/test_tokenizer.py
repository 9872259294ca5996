"""Conversations as token ids, and tokenizers that are rejected."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.data.tokenizer import (
    encode_conversation,
    encode_prompt,
    load_tokenizer,
    num_embeddings,
    tokenizer_digests,
)
from pear_ray.errors import ConfigError

WORDS = st.lists(st.sampled_from([f"w{n}" for n in range(97)]), min_size=1, max_size=6)


def message(role, words):
    return {"role": role, "content": " ".join(words)}


def user(words):
    return message("user", words)


def assistant(words):
    return message("assistant", words)


QUESTIONS = st.lists(st.builds(message, st.sampled_from(["system", "user", "tool"]), WORDS), min_size=1)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model(False)))


@settings(deadline=None)
@given(rounds=st.lists(st.tuples(QUESTIONS, WORDS), min_size=1, max_size=4))
def test_conversation_is_prompt_then_trainable_answers_among_other_tokens(tokenizer, rounds):
    messages, expected = [], []
    for questions, answer in rounds:
        messages += [*questions, assistant(answer)]
        for question in questions:
            others = tokenizer.convert_tokens_to_ids(question["content"].split())
            expected += [(token, False) for token in others]
        own = [*tokenizer.convert_tokens_to_ids(answer), tokenizer.eos_token_id]
        expected += [(token, True) for token in own]
    found = encode_conversation(tokenizer, messages)
    assert found.prompt_ids == encode_prompt(tokenizer, rounds[0][0])
    answers = expected[len(found.prompt_ids) :]
    assert found.response_ids == [token for token, _ in answers]
    assert found.trainable == [is_own for _, is_own in answers]
    # Before its last answer the model saw the same ids as a prompt.
    num_last = len(rounds[-1][1]) + 1
    whole = found.prompt_ids + found.response_ids
    assert whole[:-num_last] == encode_prompt(tokenizer, messages[:-1])
    text = tokenizer.decode(whole[-num_last:], skip_special_tokens=True)
    assert text == " ".join(rounds[-1][1])


def test_tokens_after_the_end_of_an_answer_are_not_trainable(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    ending = "{{ ' w9' if message['role'] == 'assistant' }}{% if not loop.last %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{% if not loop.last %}", ending)
    words = tokenizer.convert_tokens_to_ids(["w1", "w2", "<eos>", "w9", "w3", "w4", "<eos>"])
    for turns in (1, 2):
        messages = [user(["w1"]), assistant(["w2"]), user(["w3"]), assistant(["w4"])][: 2 * turns]
        found = encode_conversation(tokenizer, messages)
        assert found.prompt_ids == words[:1]
        assert found.response_ids == (words[1:3] if turns == 1 else words[1:])
        assert found.trainable == [True, True, False, False, True, True][: len(found.response_ids)]


def test_answer_without_end_token_is_trainable_to_its_last_word(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    messages = [user(["w1"]), assistant(["w2"]), user(["w3"]), assistant(["w4", "w5"])]
    found = encode_conversation(tokenizer, messages)
    assert found.response_ids == tokenizer.convert_tokens_to_ids(["w2", "w3", "w4", "w5"])
    assert found.trainable == [True, False, True, True]


def test_generation_prompt_is_part_of_the_prompt(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w90 ' if m['role'] == 'assistant' }}{{ m['content'] }} "
        "{{ eos_token ~ ' ' }}{% endfor %}{{ 'w90 ' if add_generation_prompt }}"
    )
    messages = [user(["w1"]), assistant(["w2"]), user(["w3"]), assistant(["w4"])]
    found = encode_conversation(tokenizer, messages)
    spelt = tokenizer.convert_ids_to_tokens(found.prompt_ids + found.response_ids)
    assert " ".join(spelt) == "w1 <eos> w90 w2 <eos> w3 <eos> w90 w4 <eos>"
    assert found.prompt_ids == encode_prompt(tokenizer, messages[:1])
    assert found.trainable == [True, True, False, False, False, True, True]


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("content", ["", "  "])
def test_empty_answer_is_rejected(tiny_model, content, number):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    messages = [user(["w1"]), assistant(["w2"]), user(["w3"]), assistant(["w4"])]
    messages[number] = {"role": "assistant", "content": content}
    with pytest.raises(ValueError, match=rf"^messages\.{number}: expected an answer, got an empty one$"):
        encode_conversation(tokenizer, messages)


def test_template_that_rewrites_the_prompt_is_rejected(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    tokenizer.chat_template = "w{{ messages | length }} " + tokenizer.chat_template
    with pytest.raises(ValueError, match=r"^messages\.1: expected a chat template"):
        encode_conversation(tokenizer, [user(["w1"]), assistant(["w2"])])


def test_template_that_rewrites_an_earlier_answer_is_rejected(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    kept = "(message['content'] if loop.last else message['content'].replace('w9 ', ''))"
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", kept)
    thought = [user(["w1"]), assistant(["w9", "w2"])]
    assert len(encode_conversation(tokenizer, thought).response_ids) == 3
    more = [*thought, user(["w3"]), assistant(["w4"])]
    with pytest.raises(ValueError, match=r"^messages\.1: expected a chat template"):
        encode_conversation(tokenizer, more)
    assert encode_conversation(tokenizer, [user(["w1"]), assistant(["w2"]), *more[2:]]).trainable


def test_error_of_the_template_is_reported(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    refusal = "{% if messages | length > 1 %}{{ raise_exception('too much') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    with pytest.raises(ValueError, match=r"^messages: rejected by the chat template: too much$"):
        encode_conversation(tokenizer, [user(["w1"]), assistant(["w2"])])


def test_num_embeddings_is_padded(tiny_model):
    # 97 words and three special tokens, padded to a multiple of 64.
    assert num_embeddings(str(tiny_model(False))) == 128


def test_digests_separate_vocabulary_and_template(tiny_model):
    path = str(tiny_model(False))
    vocabulary, template = tokenizer_digests(load_tokenizer(path))
    assert (vocabulary, template) == tokenizer_digests(load_tokenizer(str(tiny_model(True))))

    other = load_tokenizer(path)
    other.chat_template += " "
    assert tokenizer_digests(other)[0] == vocabulary
    assert tokenizer_digests(other)[1] != template

    other = load_tokenizer(path)
    other.add_tokens(["w97"])
    assert tokenizer_digests(other)[0] != vocabulary
    assert tokenizer_digests(other)[1] == template


@pytest.fixture
def copied_model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model(False), tmp_path / "model")


def test_folder_without_tokenizer_is_rejected(copied_model):
    for file in copied_model.glob("*token*"):
        file.unlink()
    (copied_model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=rf"model\.path: expected a tokenizer .* {copied_model}"):
        load_tokenizer(str(copied_model))


def test_missing_folder_is_rejected(tmp_path):
    absent = tmp_path / "absent"
    with pytest.raises(ConfigError, match=rf"model\.path: expected a tokenizer, got {absent}"):
        load_tokenizer(str(absent))


def test_tokenizer_without_template_is_rejected(copied_model):
    (copied_model / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"^model\.path: expected .* chat template, got none"):
        load_tokenizer(str(copied_model))


def test_tokenizer_without_end_of_sequence_is_rejected(copied_model):
    path = copied_model / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    del facts["eos_token"]
    path.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=r"^model\.path: expected .* end-of-sequence token, got none"):
        load_tokenizer(str(copied_model))


def test_damaged_tokenizer_is_rejected(copied_model):
    (copied_model / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ConfigError, match=rf"model\.path: expected a tokenizer, got {copied_model}"):
        load_tokenizer(str(copied_model))
