"""A model on a pack of sequences against transformers on one at a time; what text is as tokens."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pear_ray.algorithms.packing import pack
from pear_ray.config import BadInput
from pear_ray.engines.attention import unfolding
from pear_ray.engines.model import (
    conversation_ids,
    digests,
    load_policy,
    load_tokenizer,
    prompt_ids,
)
from pear_ray.records import TrainingSequence

WORDS = st.lists(st.sampled_from([f"w{n}" for n in range(97)]), min_size=1, max_size=6)


def grouped_query_model(tmp_path):
    """Four query heads to one key-value head, and tokens the tokenizer does not know."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(params=["tied", "untied", "grouped"])
def folder(request, tiny_model, tmp_path):
    if request.param == "grouped":
        return grouped_query_model(tmp_path)
    return tiny_model(request.param == "tied")


def sequences_of(lengths, seed):
    draw = np.random.default_rng(seed)
    sequences = []
    for number, (num_prompt, num_response) in enumerate(lengths):
        ids = draw.integers(0, 128, num_prompt + num_response)
        coefficient = float(draw.normal())
        sequences.append(
            TrainingSequence.of(
                ids[:num_prompt], ids[num_prompt:], np.zeros(num_response), coefficient, str(number)
            )
        )
    return sequences


def one_by_one(model, sequence):
    """Log-prob of each trainable token and entropy at its place, as transformers has them."""
    ids = torch.from_numpy(sequence.token_ids)
    log_softmax = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    places = torch.from_numpy(np.flatnonzero(sequence.trainable))
    entropies = -(log_softmax.exp() * log_softmax).sum(-1)[places - 1]
    return log_softmax[places - 1, ids[places]], entropies


@pytest.mark.parametrize("num_logits_chunks", [1, 7, 100])
def test_a_pack_is_its_sequences_one_by_one(folder, num_logits_chunks):
    lengths = [(1, 1), (5, 9), (1, 30), (20, 1), (3, 3), (2, 14)]
    ((batch,),) = pack(sequences_of(lengths, 0), 1, 1000)
    policy = load_policy(str(folder), "float32", num_logits_chunks)
    logprobs, entropies = policy(
        torch.from_numpy(batch.token_ids_T),
        torch.from_numpy(batch.position_ids_T),
        *unfolding(batch.sequence_ids_T),
        torch.from_numpy(np.flatnonzero(batch.trainable_T)),
    )
    coefficients = torch.from_numpy(batch.coefficients_T[batch.trainable_T])
    (logprobs * coefficients).sum().backward()

    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    by_origin = {sequence.origin: sequence for sequence in sequences_of(lengths, 0)}
    ordered = [by_origin[origin] for origin in batch.origins]
    found = [one_by_one(reference, sequence) for sequence in ordered]
    (torch.cat([f[0] for f in found]) * coefficients).sum().backward()

    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(logprobs, torch.cat([f[0] for f in found]), **close)
    torch.testing.assert_close(entropies, torch.cat([f[1] for f in found]).detach(), **close)
    theirs = dict(reference.named_parameters())
    assert theirs.keys() == dict(policy.language_model.named_parameters()).keys()
    for name, parameter in policy.language_model.named_parameters():
        scale = float(theirs[name].grad.abs().max())
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, rtol=0, atol=1e-5 * scale, msg=name
        )


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
