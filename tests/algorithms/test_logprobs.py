"""Chunked log-probabilities against a softmax over all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pear_ray.algorithms.logprobs import predicted_logprobs

WIDTH, VOCABULARY, TOKENS = 6, 11, 17


class Network(nn.Module):
    """Hidden states that depend on all tokens before, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def hidden(self, token_ids_T):
        return self.embedding(token_ids_T).cumsum(0).tanh()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().double()


@pytest.fixture
def token_ids_T():
    return torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))


def gradients(network, value):
    network.zero_grad()
    value.backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


SELECTIONS = {
    "all but the first": list(range(1, TOKENS)),
    "two responses": [3, 4, 5, 6, 11, 12, 13],
    "one": [9],
    "out of order": [8, 2, 15, 1],
}


@pytest.mark.parametrize("positions", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 5, 16, 1000])
def test_values_and_gradients_are_those_of_the_full_softmax(
    network, token_ids_T, positions, num_chunks
):
    predicted = torch.tensor(positions)
    weights = torch.linspace(-1, 2, len(positions), dtype=torch.float64)
    everything = network.head(network.hidden(token_ids_T)).float().log_softmax(-1)
    expected = torch.stack([everything[t - 1, token_ids_T[t]] for t in positions])
    expected_entropies = -(everything.exp() * everything).sum(-1)[predicted - 1]
    expected_gradients = gradients(network, (weights * expected).sum())
    logprobs, entropies = predicted_logprobs(
        network.hidden(token_ids_T), network.head, token_ids_T, predicted, num_chunks
    )
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropies, expected_entropies.detach())
    assert logprobs.dtype == torch.float32 and entropies.dtype == torch.float32
    assert not entropies.requires_grad
    found_gradients = gradients(network, (weights * logprobs).sum())
    for found, wanted in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_nothing_selected_still_reaches_every_parameter(network, token_ids_T):
    """Under ZeRO-3 a rank without a trainable token runs the same backward pass as the others."""
    logprobs, entropies = predicted_logprobs(
        network.hidden(token_ids_T), network.head, token_ids_T, torch.empty(0).long(), 4
    )
    assert logprobs.shape == entropies.shape == (0,)
    for gradient in gradients(network, logprobs.sum()):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_logits_never_exist_for_more_than_a_chunk(network, token_ids_T):
    """Neither in the forward pass nor in the backward pass, which makes them again."""
    seen = []

    def head(hidden):
        seen.append(len(hidden))
        return network.head(hidden)

    logprobs, _ = predicted_logprobs(
        network.hidden(token_ids_T), head, token_ids_T, torch.arange(1, TOKENS), 4
    )
    assert seen == [4, 4, 4, 4]
    logprobs.sum().backward()
    assert seen == [4] * 8


def test_half_precision_hidden_states_give_float32_softmax(network, token_ids_T):
    half = network.bfloat16()
    predicted = torch.arange(1, TOKENS)
    logprobs, entropies = predicted_logprobs(
        half.hidden(token_ids_T), half.head, token_ids_T, predicted, 3
    )
    logits = half.head(half.hidden(token_ids_T)).float()
    expected = logits.log_softmax(-1)[predicted - 1, token_ids_T[predicted]]
    assert logprobs.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected)


def test_huge_logits_overflow_nowhere(token_ids_T):
    hidden = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)) * 1e4
    head = nn.Linear(WIDTH, VOCABULARY)
    logprobs, entropies = predicted_logprobs(hidden, head, token_ids_T, torch.arange(1, TOKENS), 4)
    assert logprobs.isfinite().all() and (logprobs <= 0).all()
    assert entropies.isfinite().all()
