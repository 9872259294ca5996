"""Per-token losses of RL: their formulas, and the cases in which two of them agree."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.losses import LossInputs
from pear_ray.losses.policy import Cispo, Gspo, Nft, PolicyGradient, PpoClip, RatioInLoss, TokenMean, group_advantages

PPO = PolicyGradient(PpoClip(0.2, 0.28), RatioInLoss(), TokenMean())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(-5, 0, width=32), st.floats(-5, 0, width=32), st.sampled_from([1.0, -1.0, 0.0, 0.37, -2.5])
        ),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([(0.2, 0.28), (0.2, 0.2), (0.5, 3.0)]),
)
def test_ppo_clip_token_by_token(rows, clips):
    low, high = clips
    loss, gradient, clipped = 0.0, [], 0
    for logprob, sampled, advantage in rows:
        ratio = math.exp(logprob - sampled)
        held = ratio > 1 + high if advantage > 0 else ratio < 1 - low
        bound = 1 + high if advantage > 0 else 1 - low
        loss -= advantage * (bound if held else ratio)
        gradient.append(0.0 if held else -advantage * ratio)
        clipped += held and advantage != 0
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    logprobs = columns[0].requires_grad_()
    tokens = LossInputs(
        logprobs,
        torch.zeros(len(rows)),
        *columns[1:],
        torch.zeros(len(rows)).long(),
        ("p",),
        num_tokens_global=len(rows),
        num_sequences_global=1,
    )
    sums = PolicyGradient(PpoClip(low, high), RatioInLoss(), TokenMean())(tokens)
    sums.loss.backward()
    scale = sum(abs(g) for g in gradient) + abs(loss) + 1
    assert sums.loss.item() == pytest.approx(loss, abs=1e-5 * scale)
    torch.testing.assert_close(logprobs.grad, torch.tensor(gradient), rtol=1e-5, atol=1e-6)
    assert int(sums.metric_sums["clipped"]) == clipped


def test_on_policy_gradient_is_reinforce_without_mismatch(random_tokens):
    tokens = random_tokens(3, [10, 20], spread=0.0)
    sums = PPO(tokens)
    sums.loss.backward()
    assert torch.equal(tokens.logprobs.grad, -tokens.coefficients)
    metrics = {name: float(value) for name, value in sums.metric_sums.items()}
    assert metrics["ratio"] == metrics["ratio_squared"] == 30
    assert metrics["clipped"] == metrics["mismatch"] == metrics["mismatch_kl"] == 0


def log_ratios(tokens):
    return tokens.logprobs - tokens.sampled_logprobs


def gradient(loss, tokens):
    losses = loss(log_ratios(tokens), tokens).losses
    return torch.autograd.grad(losses.sum(), tokens.logprobs)[0]


@pytest.mark.parametrize("loss", [PpoClip(0.2, 0.28), Gspo(0.001, 0.002), Cispo(1.0, 0.3)])
def test_on_policy_all_losses_are_reinforce(random_tokens, loss):
    tokens = random_tokens(3, [10, 0, 20, 1], spread=0.0)
    advantages = torch.tensor([0.7, 0.0, -1.2, 0.4])
    tokens = replace(tokens, coefficients=advantages[tokens.sequence_ids])
    torch.testing.assert_close(gradient(loss, tokens), -tokens.coefficients)
    assert not loss(log_ratios(tokens), tokens).clipped.any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=16), st.sampled_from([1.0, 0.5]))
def test_on_policy_nft_is_grpo_with_the_population_standard_deviation(is_correct, floor):
    rewards_G = torch.tensor(is_correct, dtype=torch.float64)
    size = len(is_correct)
    columns = {
        "logprobs": torch.full((size,), -1.0, dtype=torch.float64, requires_grad=True),
        "entropies": torch.zeros(size),
        "sampled_logprobs": torch.full((size,), -1.0, dtype=torch.float64),
        "sequence_ids": torch.arange(size),
    }
    rest = {"origins": ("p",) * size, "num_tokens_global": size, "num_sequences_global": size}
    nft = LossInputs(**columns, **rest, coefficients=group_advantages(rewards_G, "nft"))
    expected = -group_advantages(rewards_G, "grpo") * math.sqrt(size / (size - 1))
    torch.testing.assert_close(gradient(Nft(floor), nft), expected, rtol=1e-5, atol=1e-9)
    assert not Nft(floor)(log_ratios(nft), nft).clipped.any()


def test_nft_by_hand():
    """At r = 1/4: a correct answer, and wrong ones below, above and far above the old policy."""
    ratios = torch.tensor([2.0, 0.5, 1.5, 6.0, 3.0], dtype=torch.float64)
    tokens = LossInputs(
        logprobs=ratios.log().requires_grad_(),
        entropies=torch.zeros(5),
        sampled_logprobs=torch.zeros(5, dtype=torch.float64),
        coefficients=torch.tensor([0.25, -0.25, -0.25, -0.25, 0.0], dtype=torch.float64),
        sequence_ids=torch.arange(5),
        origins=("p",) * 5,
        num_tokens_global=5,
        num_sequences_global=5,
    )
    losses, clipped = Nft(floor=0.5)(log_ratios(tokens), tokens)
    w = math.sqrt(3)
    # (1 - R / 4) / (3 / 4) is 7/6, 5/6 and -2/3.
    expected = [-w * math.log(2), -w * math.log(7 / 6), -w * math.log(5 / 6), -w * math.log(0.5), 0]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))
    assert clipped.tolist() == [False, False, False, True, False]
    # d/dlog R of (1 - R / 4) / (3 / 4) is -R / 3, over what it is, or over the floor.
    slopes = [-w, w * 0.5 / 3 / (7 / 6), w * 1.5 / 3 / (5 / 6), w * 6 / 3 / 0.5, 0]
    grad = gradient(Nft(floor=0.5), tokens)
    torch.testing.assert_close(grad, torch.tensor(slopes, dtype=torch.float64))


def test_gspo_on_single_tokens_equals_ppo(random_tokens):
    tokens = random_tokens(2, [1, 1, 0, 1, 1, 1] * 5)
    of_token, of_sequence = (loss(log_ratios(tokens), tokens) for loss in (PpoClip(0.1, 0.2), Gspo(0.1, 0.2)))
    assert torch.equal(of_token.losses, of_sequence.losses)
    assert torch.equal(of_token.clipped, of_sequence.clipped) and of_token.clipped.any()
    assert torch.equal(gradient(PpoClip(0.1, 0.2), tokens), gradient(Gspo(0.1, 0.2), tokens))


def test_gspo_clips_sequences_as_a_whole(random_tokens):
    """The ratio is a geometric mean: one outlier token does not clip its sequence."""
    tokens = random_tokens(2, [4, 4], coefficients=(2.0,))
    gaps = torch.tensor([0.4, -0.3, 0.1, -0.16, 0.4, 0.3, 0.1, 0.16])
    log_ratios = tokens.logprobs - tokens.logprobs.detach() + gaps
    losses, clipped = Gspo(0.05, 0.05)(log_ratios, tokens)
    first = math.exp((0.4 - 0.3 + 0.1 - 0.16) / 4)
    torch.testing.assert_close(losses, torch.tensor([-2 * first] * 4 + [-2 * 1.05] * 4))
    assert clipped.tolist() == [False] * 4 + [True] * 4
    (grad,) = torch.autograd.grad(losses.sum(), tokens.logprobs)
    torch.testing.assert_close(grad, torch.tensor([-2 * first] * 4 + [0.0] * 4))


def test_cispo_bounds_the_weight_of_tokens_that_ppo_drops(random_tokens):
    tokens = random_tokens(4, [200], coefficients=(1.5, -0.5, 0.0))
    ratios = log_ratios(tokens).detach().exp()
    grad = gradient(Cispo(0.2, 0.1), tokens)
    torch.testing.assert_close(grad, -tokens.coefficients * ratios.clamp(0.8, 1.1))
    outside = (ratios < 0.8) | (ratios > 1.1)
    clipped = Cispo(0.2, 0.1)(log_ratios(tokens), tokens).clipped
    assert torch.equal(clipped, outside & (tokens.coefficients != 0)) and clipped.any()
    dropped = gradient(PpoClip(0.2, 0.1), tokens) == 0
    assert (dropped & (grad != 0)).any()
    assert torch.equal(gradient(PpoClip(0.2, 0.1), tokens)[~outside], grad[~outside])
