"""What a conversation is as token ids, and tokenizers that cannot be used."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pear_ray.config import BadInput
from pear_ray.engines.tokenizer import (
    conversation_ids,
    digests,
    load_tokenizer,
    prompt_ids,
)

WORDS = st.lists(st.sampled_from([f"w{n}" for n in range(97)]), min_size=1, max_size=6)


def user(words):
    return {"role": "user", "content": " ".join(words)}


def assistant(words):
    return {"role": "assistant", "content": " ".join(words)}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(question=WORDS, answer=WORDS, earlier=st.lists(st.tuples(WORDS, WORDS), max_size=2))
def test_a_conversation_is_its_prompt_then_the_answer_then_its_end(
    tiny_model, question, answer, earlier
):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    turns = [message for pair in earlier for message in (user(pair[0]), assistant(pair[1]))]
    messages = [*turns, user(question), assistant(answer)]
    prompt, response = conversation_ids(tokenizer, messages)
    assert prompt == prompt_ids(tokenizer, messages[:-1])
    assert response == [*tokenizer.convert_tokens_to_ids(answer), tokenizer.eos_token_id]
    assert prompt.count(tokenizer.eos_token_id) == len(earlier)
    assert tokenizer.decode(response, skip_special_tokens=True) == " ".join(answer)


def test_what_follows_the_answers_end_is_not_learned(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    tokenizer.chat_template += "{% if not add_generation_prompt %}{{ ' w9' }}{% endif %}"
    messages = [user(["w1"]), assistant(["w2"])]
    assert conversation_ids(tokenizer, messages)[1][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("content", ["", "  "])
def test_an_empty_answer_is_refused(tiny_model, content):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    with pytest.raises(ValueError, match="answer is empty"):
        conversation_ids(tokenizer, [user(["w1"]), {"role": "assistant", "content": content}])


def test_a_template_that_rewrites_the_prompt_is_refused(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model(False)))
    tokenizer.chat_template = "w{{ messages | length }} " + tokenizer.chat_template
    with pytest.raises(ValueError, match="does not keep the prompt's tokens"):
        conversation_ids(tokenizer, [user(["w1"]), assistant(["w2"])])


def test_digests_tell_vocabularies_and_templates_apart(tiny_model):
    path = str(tiny_model(False))
    vocabulary, template = digests(load_tokenizer(path))
    assert (vocabulary, template) == digests(load_tokenizer(str(tiny_model(True))))

    other = load_tokenizer(path)
    other.chat_template += " "
    assert digests(other)[0] == vocabulary
    assert digests(other)[1] != template

    other = load_tokenizer(path)
    other.add_tokens(["w97"])
    assert digests(other)[0] != vocabulary
    assert digests(other)[1] == template


@pytest.fixture
def copied_model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model(False), tmp_path / "model")


def test_a_folder_without_tokenizer_is_bad_input(copied_model):
    for file in copied_model.glob("*token*"):
        file.unlink()
    (copied_model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(BadInput, match=rf"model\.path: {copied_model}: .* expected one"):
        load_tokenizer(str(copied_model))


def test_a_folder_that_is_not_there_is_bad_input(tmp_path):
    absent = tmp_path / "absent"
    with pytest.raises(BadInput, match=rf"model\.path: {absent}: no tokenizer .* expected one"):
        load_tokenizer(str(absent))


def test_a_tokenizer_without_template_is_bad_input(copied_model):
    (copied_model / "chat_template.jinja").unlink()
    with pytest.raises(BadInput, match=r"no chat template; expected one"):
        load_tokenizer(str(copied_model))


def test_a_tokenizer_without_end_of_sequence_is_bad_input(copied_model):
    path = copied_model / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    del facts["eos_token"]
    path.write_text(json.dumps(facts))
    with pytest.raises(BadInput, match=r"no end-of-sequence token; expected one"):
        load_tokenizer(str(copied_model))


def test_a_damaged_tokenizer_is_bad_input(copied_model):
    (copied_model / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(BadInput, match=rf"model\.path: {copied_model}: no tokenizer can be loaded"):
        load_tokenizer(str(copied_model))
