"""A model on a pack of sequences against transformers on one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pear_ray.losses.packing import pack
from pear_ray.records import TrainingSequence
from pear_ray.train.model import load_policy, policy_inputs


def grouped_query_model(tmp_path):
    """Four query heads per key-value head, and a vocabulary beyond the tokenizer's."""
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
            TrainingSequence.of(ids[:num_prompt], ids[num_prompt:], np.zeros(num_response), coefficient, str(number))
        )
    return sequences


def one_by_one(model, sequence):
    """Return each trainable token's log-prob and the entropy at its position, by transformers."""
    ids = torch.from_numpy(sequence.token_ids)
    log_softmax = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    positions = torch.from_numpy(np.flatnonzero(sequence.trainable))
    entropies = -(log_softmax.exp() * log_softmax).sum(-1)[positions - 1]
    return log_softmax[positions - 1, ids[positions]], entropies


@pytest.mark.parametrize("logits_mib", [512.0, 0.01, 1e-6])
def test_a_pack_is_its_sequences_one_by_one(folder, logits_mib):
    lengths = [(1, 1), (5, 9), (1, 30), (20, 1), (3, 3), (2, 14)]
    ((batch,),) = pack(sequences_of(lengths, 0), 1, 1000)
    policy = load_policy(str(folder), "float32", logits_mib)
    candidates, entropies, _ = policy(**policy_inputs(batch, torch.device("cpu")))
    logprobs = candidates[:, 0]
    coefficients = torch.from_numpy(batch.coefficients_T[batch.trainable_T])
    (logprobs * coefficients).sum().backward()

    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    by_origin = {sequence.origin: sequence for sequence in sequences_of(lengths, 0)}
    ordered = [by_origin[origin] for origin in batch.origins]
    expected = [torch.cat(parts) for parts in zip(*(one_by_one(reference, s) for s in ordered), strict=True)]
    (expected[0] * coefficients).sum().backward()

    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(logprobs, expected[0], **close)
    torch.testing.assert_close(entropies, expected[1].detach(), **close)
    theirs = dict(reference.named_parameters())
    assert theirs.keys() == dict(policy.language_model.named_parameters()).keys()
    for name, parameter in policy.language_model.named_parameters():
        scale = float(theirs[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-5 * scale, msg=name)
