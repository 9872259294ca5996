"""What a conversation is as token ids, and tokenizers that cannot be used."""

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


def user(words):
    return {"role": "user", "content": " ".join(words)}


def assistant(words):
    return {"role": "assistant", "content": " ".join(words)}


def asked(role, words):
    return {"role": role, "content": " ".join(words)}


ASKED = st.lists(st.builds(asked, st.sampled_from(["system", "user", "tool"]), WORDS), min_size=1)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model(False)))


@settings(deadline=None)
@given(rounds=st.lists(st.tuples(ASKED, WORDS), min_size=1, max_size=4))
def test_a_conversation_is_its_prompt_then_answers_with_their_ends_among_other_words(
    tokenizer, rounds
):
    messages, expected = [], []
    for questions, answer in rounds:
        messages += [*questions, assistant(answer)]
        for message in questions:
            others = tokenizer.convert_tokens_to_ids(message["content"].split())
            expected += [(token, False) for token in others]
        own = [*tokenizer.convert_tokens_to_ids(answer), tokenizer.eos_token_id]
        expected += [(token, True) for token in own]
    found = encode_conversation(tokenizer, messages)
    assert found.prompt_ids == encode_prompt(tokenizer, rounds[0][0])
    answers = expected[len(found.prompt_ids) :]
    assert found.response_ids == [token for token, _ in answers]
    assert found.trainable == [is_own for _, is_own in answers]
    # What the model saw before its last answer, as it will be asked for it.
    num_last = len(rounds[-1][1]) + 1
    whole = found.prompt_ids + found.response_ids
    assert whole[:-num_last] == encode_prompt(tokenizer, messages[:-1])
    text = tokenizer.decode(whole[-num_last:], skip_special_tokens=True)
    assert text == " ".join(rounds[-1][1])


def test_what_follows_the_answers_end_is_not_learned(tiny_model):
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


def test_an_answer_that_no_token_ends_is_learned_to_its_last_word(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    messages = [user(["w1"]), assistant(["w2"]), user(["w3"]), assistant(["w4", "w5"])]
    found = encode_conversation(tokenizer, messages)
    assert found.response_ids == tokenizer.convert_tokens_to_ids(["w2", "w3", "w4", "w5"])
    assert found.trainable == [True, False, True, True]


def test_what_the_template_writes_for_the_assistant_to_begin_with_is_of_the_prompt(tiny_model):
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
def test_an_empty_answer_is_refused(tiny_model, content, number):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    messages = [user(["w1"]), assistant(["w2"]), user(["w3"]), assistant(["w4"])]
    messages[number] = {"role": "assistant", "content": content}
    with pytest.raises(ValueError, match=rf"^messages\.{number}: the assistant's answer is empty$"):
        encode_conversation(tokenizer, messages)


def test_a_template_that_rewrites_the_prompt_is_refused(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    tokenizer.chat_template = "w{{ messages | length }} " + tokenizer.chat_template
    with pytest.raises(
        ValueError, match=r"^messages\.1: the chat template does not keep the tokens"
    ):
        encode_conversation(tokenizer, [user(["w1"]), assistant(["w2"])])


def test_a_template_that_rewrites_an_earlier_answer_is_refused(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    kept = "(message['content'] if loop.last else message['content'].replace('w9 ', ''))"
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", kept)
    thought = [user(["w1"]), assistant(["w9", "w2"])]
    assert len(encode_conversation(tokenizer, thought).response_ids) == 3
    more = [*thought, user(["w3"]), assistant(["w4"])]
    with pytest.raises(
        ValueError, match=r"^messages\.1: the chat template does not keep the tokens"
    ):
        encode_conversation(tokenizer, more)
    assert encode_conversation(tokenizer, [user(["w1"]), assistant(["w2"]), *more[2:]]).trainable


def test_a_template_that_refuses_a_conversation_says_why(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    refusal = "{% if messages | length > 1 %}{{ raise_exception('too much') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    with pytest.raises(ValueError, match=r"^messages: the chat template refuses them: too much$"):
        encode_conversation(tokenizer, [user(["w1"]), assistant(["w2"])])


def test_a_model_knows_as_many_ids_as_it_has_embeddings(tiny_model):
    # 97 words and three special tokens, padded to a multiple of 64.
    assert num_embeddings(str(tiny_model(False))) == 128


def test_digests_tell_vocabularies_and_templates_apart(tiny_model):
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


def test_a_folder_without_tokenizer_is_bad_input(copied_model):
    for file in copied_model.glob("*token*"):
        file.unlink()
    (copied_model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=rf"model\.path: {copied_model}: .* expected one"):
        load_tokenizer(str(copied_model))


def test_a_folder_that_is_not_there_is_bad_input(tmp_path):
    absent = tmp_path / "absent"
    with pytest.raises(ConfigError, match=rf"model\.path: {absent}: no tokenizer .* expected one"):
        load_tokenizer(str(absent))


def test_a_tokenizer_without_template_is_bad_input(copied_model):
    (copied_model / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"no chat template; expected one"):
        load_tokenizer(str(copied_model))


def test_a_tokenizer_without_end_of_sequence_is_bad_input(copied_model):
    path = copied_model / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    del facts["eos_token"]
    path.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=r"no end-of-sequence token; expected one"):
        load_tokenizer(str(copied_model))


def test_a_damaged_tokenizer_is_bad_input(copied_model):
    (copied_model / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(
        ConfigError, match=rf"model\.path: {copied_model}: no tokenizer can be loaded"
    ):
        load_tokenizer(str(copied_model))
