"""RL objectives, packed into micro-batches, against their textbook form: token by token over whole sequences, in
float64, for a model that is one table."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from pear_ray.losses import LossInputs
from pear_ray.losses.packing import pack
from pear_ray.losses.policy import (
    Cispo,
    ConstantLength,
    Gspo,
    KlToReference,
    Nft,
    PolicyGradient,
    PpoClip,
    RatioInLoss,
    SequenceMean,
    TokenMean,
    TruncatedIS,
)
from pear_ray.records import TrainingSequence

VOCABULARY = 8
LOSSES = {"ppo": PpoClip(0.2, 0.28), "gspo": Gspo(0.1, 0.05), "cispo": Cispo(0.3, 0.1), "nft": Nft(0.9)}
CORRECTIONS = {"ratio": RatioInLoss(), "truncated": TruncatedIS(1.2)}
AGGREGATIONS = {"tokens": TokenMean(), "sequences": SequenceMean(), "constant": ConstantLength(30)}
PENALTIES = {"no penalty": None, "penalty": KlToReference(0.3)}
ALL = list(product(LOSSES, CORRECTIONS, AGGREGATIONS, PENALTIES))
# Every pair of choices at least once.
RECIPES = [recipe for number, recipe in enumerate(ALL) if number % 12 in (0, 3, 4, 7, 8, 11)]
# Ranks and tokens in a micro-batch: one pack, many, and more ranks than sequences.
CUTS = ((1, 1000), (2, 30), (9, 20))


def objective_from(loss, correction, aggregation, penalty):
    return PolicyGradient(LOSSES[loss], CORRECTIONS[correction], AGGREGATIONS[aggregation], PENALTIES[penalty])


def log_table(seed):
    """Return logits of the next token given the last, [vocabulary, vocabulary]."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((VOCABULARY, VOCABULARY)))


def make_sequences(table, seed, advantages, spread=0.3):
    """Return completions of a policy near the table's; one is not trainable, one only in part."""
    rng = np.random.default_rng(seed)
    logs = table.log_softmax(-1).numpy()
    sequences = []
    for number, num_response in enumerate((1, 12, 7, 3, 12, 9)):
        prompt = rng.integers(0, VOCABULARY, rng.integers(1, 4))
        response = rng.integers(0, VOCABULARY, num_response)
        own = logs[np.concatenate([prompt[-1:], response[:-1]]), response]
        trainable = np.full(num_response, number != 2)
        trainable[3:5] &= number != 5
        sequences.append(
            TrainingSequence.of(
                prompt,
                response,
                own + spread * rng.standard_normal(num_response),
                advantages[number % len(advantages)],
                f"problem-{number}",
                response_trainable=trainable,
                reference_logprobs=own + rng.standard_normal(num_response),
            )
        )
    return sequences


def advantages_for(loss):
    return (0.25, -0.25, 0.6, -0.6, 0.0) if loss == "nft" else (1.3, -0.7, 0.0, 0.4)


def loss_inputs(batch, table):
    """Return the inputs that the learner would compute from a micro-batch."""
    positions = np.flatnonzero(batch.trainable_T)
    logs = table.float().log_softmax(-1)[batch.token_ids_T[positions - 1]]
    arrays = {
        "logprobs": logs.gather(-1, torch.from_numpy(batch.token_ids_T[positions, None]))[:, 0],
        "entropies": -(logs.detach() * logs.detach().exp()).sum(-1),
    }
    chosen = {
        name: torch.from_numpy(getattr(batch, f"{name}_T")[positions])
        for name in ("sampled_logprobs", "coefficients", "sequence_ids", "reference_logprobs")
    }
    return LossInputs(
        **arrays,
        **chosen,
        origins=batch.origins,
        num_tokens_global=batch.num_trainable_tokens_global,
        num_sequences_global=batch.num_sequences_global,
    )


def take_step(objective, sequences, table, cut):
    """Return loss, gradient by the table and metric sums of one step, accumulated as the learner does."""
    table = table.clone().requires_grad_()
    loss, metrics = 0.0, {}
    batches = [batch for rank in pack(sequences, *cut) for batch in rank]
    for batch in batches:
        sums = objective(loss_inputs(batch, table))
        (sums.loss / batch.num_trainable_tokens_global).backward()
        loss += sums.loss.item() / batch.num_trainable_tokens_global
        for name, value in sums.metric_sums.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    return loss, table.grad, metrics


def slow_clip(ratio, advantage, low, high):
    bound = 1 + high if advantage > 0 else 1 - low
    beyond = ratio > bound if advantage > 0 else ratio < bound
    return -advantage * (torch.tensor(bound).double() if beyond else ratio)


def slow_nft(log_ratio, coefficient, floor):
    if coefficient == 0:
        return 0 * log_ratio
    rate = abs(coefficient)
    weight = math.sqrt((1 - rate) / rate)
    if coefficient > 0:
        return -weight * log_ratio
    other = (1 - rate * log_ratio.exp()) / (1 - rate)
    if other >= floor:
        return -weight * other.log()
    return -weight * (math.log(floor) + (other - other.item()) / floor)


def slow_term(loss, index, log_ratios, logprobs, advantage):
    """Return the loss of one token, given the log-ratios of its sequence."""
    ratio = log_ratios[index].exp()
    if loss == "ppo":
        return slow_clip(ratio, advantage, 0.2, 0.28)
    if loss == "gspo":
        return slow_clip((sum(log_ratios) / len(log_ratios)).exp(), advantage, 0.1, 0.05)
    if loss == "cispo":
        return -min(max(ratio.item(), 0.7), 1.1) * advantage * logprobs[index]
    return slow_nft(log_ratios[index], advantage, 0.9)


def slow_sequence(loss, correction, penalty, sequence, logs):
    """Return the losses of the trainable tokens of one sequence."""
    ids, positions = sequence.token_ids, np.flatnonzero(sequence.trainable)
    logprobs = [logs[ids[position - 1], ids[position]] for position in positions]
    log_ratios, weights = [], []
    for position, logprob in zip(positions, logprobs, strict=True):
        gap = logprob - float(sequence.sampled_logprobs[position])
        truncated = correction == "truncated"
        log_ratios.append(logprob - logprob.item() if truncated else gap)
        weights.append(min(math.exp(gap.item()), 1.2) if truncated else 1.0)
    losses = []
    for number, position in enumerate(positions):
        advantage = float(sequence.coefficients[position])
        term = slow_term(loss, number, log_ratios, logprobs, advantage)
        losses.append(weights[number] * term)
        if penalty == "penalty":
            apart = float(sequence.reference_logprobs[position]) - logprobs[number]
            losses[-1] = losses[-1] + 0.3 * (apart.exp() - apart - 1)
    return losses


def textbook(loss, correction, aggregation, penalty, sequences, table):
    """Return loss and gradient by the table."""
    table = table.clone().requires_grad_()
    logs = table.log_softmax(-1)
    by_sequence = [slow_sequence(loss, correction, penalty, s, logs) for s in sequences]
    by_sequence = [losses for losses in by_sequence if losses]
    flat = [one for losses in by_sequence for one in losses]
    if aggregation == "tokens":
        total = sum(flat) / len(flat)
    elif aggregation == "sequences":
        total = sum(sum(losses) / len(losses) for losses in by_sequence) / len(by_sequence)
    else:
        total = sum(flat) / 30 / len(by_sequence)
    total.backward()
    return total.item(), table.grad


@pytest.mark.parametrize("recipe", RECIPES, ids="-".join)
def test_a_step_equals_the_textbook_however_it_is_cut(recipe):
    table = log_table(0)
    sequences = make_sequences(table, 0, advantages_for(recipe[0]))
    loss, gradient = textbook(*recipe, sequences, table)
    assert gradient.abs().max() > 1e-3
    metrics = []
    for cut in CUTS:
        ours, table_grad, sums = take_step(objective_from(*recipe), sequences, table, cut)
        assert ours == pytest.approx(loss, rel=1e-4, abs=1e-6)
        torch.testing.assert_close(table_grad, gradient, rtol=1e-4, atol=1e-6)
        metrics.append(sums)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5, abs=1e-9)
    assert metrics[2] == pytest.approx(metrics[0], rel=1e-5, abs=1e-9)
    # Tokens lie on both sides of the loss's bounds, unless the ratio is always 1.
    assert (0 < metrics[0]["clipped"] < 35) == (recipe[1] == "ratio")


def test_metric_sums_equal_numpy_on_whole_sequences():
    table = log_table(0)
    sequences = make_sequences(table, 5, (1.0, -1.0))
    objective = objective_from("ppo", "truncated", "sequences", "penalty")
    metrics = take_step(objective, sequences, table, (1, 1000))[2]
    logs = table.log_softmax(-1).numpy()
    gaps, apart, entropy = [], [], 0.0
    for sequence in sequences:
        for position in np.flatnonzero(sequence.trainable):
            row = logs[sequence.token_ids[position - 1]]
            own = row[sequence.token_ids[position]]
            gaps.append(own - sequence.sampled_logprobs[position])
            apart.append(sequence.reference_logprobs[position] - own)
            entropy -= (np.exp(row) * row).sum()
    gaps, apart = np.array(gaps), np.array(apart)
    weights = np.minimum(np.exp(gaps), 1.2)
    expected = {
        "entropy": entropy,
        "ratio": np.exp(gaps).sum(),
        "ratio_squared": np.exp(2 * gaps).sum(),
        "mismatch": np.abs(gaps).sum(),
        "mismatch_kl": (np.exp(gaps) - 1 - gaps).sum(),
        "weight": weights.sum(),
        "weight_squared": (weights**2).sum(),
        "truncated": (np.exp(gaps) > 1.2).sum(),
        # pi_old is the policy itself: the loss's ratio is 1.
        "clipped": 0,
        "reference_kl": (np.exp(apart) - apart - 1).sum(),
    }
    assert 0 < expected["truncated"] < len(gaps) == 35
    assert metrics == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("recipe", RECIPES, ids="-".join)
def test_metric_sums_are_detached_and_an_empty_batch_adds_nothing(random_tokens, recipe):
    objective = objective_from(*recipe)
    metrics = objective(random_tokens(2, [4, 5], coefficients=(0.5, -0.5))).metric_sums
    assert not any(value.requires_grad for value in metrics.values())
    empty = random_tokens(0, [0])
    sums = objective(empty)
    sums.loss.backward()
    assert sums.metric_sums.keys() == metrics.keys()
    assert sums.loss.item() == 0 and empty.logprobs.grad.shape == (0,)
    assert all(not value.any() for value in sums.metric_sums.values())
    assert objective.grad_scale({}, 9) == 1 and objective.top_k == 0


def gradient(objective, tokens):
    return torch.autograd.grad(objective(tokens).loss, tokens.logprobs)[0]


def test_averages_agree_on_sequences_of_equal_length(random_tokens):
    tokens = random_tokens(1, [6, 6, 6])
    gradients = [
        gradient(PolicyGradient(PpoClip(0.2, 0.28), RatioInLoss(), aggregation), tokens)
        for aggregation in (TokenMean(), SequenceMean(), ConstantLength(6))
    ]
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    halved = PolicyGradient(PpoClip(0.2, 0.28), RatioInLoss(), ConstantLength(12))
    torch.testing.assert_close(gradient(halved, tokens), gradients[0] / 2)


def test_sequence_mean_weights_sequences_alike(random_tokens):
    """Of lengths 2 and 8 the longer has 4 times the weight by tokens, the same by sequences."""
    tokens = random_tokens(1, [2, 8], spread=0.0, coefficients=(1.0,))
    by_tokens, by_sequences = (
        -gradient(PolicyGradient(PpoClip(0.2, 0.28), RatioInLoss(), aggregation), tokens)
        for aggregation in (TokenMean(), SequenceMean())
    )
    assert by_tokens.tolist() == [1] * 10
    assert by_sequences.tolist() == [2.5] * 2 + [0.625] * 8


@pytest.mark.parametrize("cap", [0.9, 1.1, 1e9])
def test_truncated_is_is_importance_weighted_reinforce(random_tokens, cap):
    """Without a cap it is PPO without a clip, relative to the engine's policy."""
    tokens = random_tokens(3, [10, 20])
    ratios = (tokens.logprobs.detach() - tokens.sampled_logprobs).exp()
    gradients = gradient(PolicyGradient(PpoClip(0.2, 0.28), TruncatedIS(cap), TokenMean()), tokens)
    torch.testing.assert_close(gradients, -tokens.coefficients * ratios.clamp(max=cap))
    if cap > ratios.max():
        unclipped = PolicyGradient(PpoClip(1.0, math.inf), RatioInLoss(), TokenMean())
        torch.testing.assert_close(gradients, gradient(unclipped, tokens))


@pytest.mark.parametrize("loss", LOSSES)
def test_corrections_agree_without_mismatch(random_tokens, loss):
    tokens = random_tokens(3, [10, 20], spread=0.0, coefficients=(0.5, -0.5))
    gradients = [
        gradient(PolicyGradient(LOSSES[loss], correction, TokenMean()), tokens) for correction in CORRECTIONS.values()
    ]
    assert torch.equal(*gradients)


def test_expected_penalty_is_the_kl_divergence():
    """Over the whole vocabulary, each token weighted by its probability."""
    table = log_table(0)
    own, reference = table[0].log_softmax(-1), table[1].log_softmax(-1)
    tokens = LossInputs(
        logprobs=own.clone().requires_grad_(),
        entropies=torch.zeros(VOCABULARY),
        sampled_logprobs=own,
        coefficients=torch.zeros(VOCABULARY),
        sequence_ids=torch.zeros(VOCABULARY, dtype=torch.long),
        origins=("problem",),
        num_tokens_global=VOCABULARY,
        num_sequences_global=1,
        reference_logprobs=reference,
    )
    divergences = KlToReference(0.5).divergences(tokens)
    assert (divergences >= 0).all()
    expected = (own.exp() * (own - reference)).sum()
    torch.testing.assert_close((own.exp() * divergences).sum(), expected)
    objective = PolicyGradient(PpoClip(0.2, 0.28), RatioInLoss(), TokenMean(), KlToReference(0.5))
    torch.testing.assert_close(gradient(objective, tokens), 0.5 * (1 - (reference - own).exp()))


def test_the_penalty_is_zero_at_the_reference(random_tokens):
    tokens = random_tokens(0, [5, 9])
    there = replace(tokens, reference_logprobs=tokens.logprobs.detach())
    penalty = KlToReference(0.5).divergences(there)
    assert not penalty.any()
    assert not torch.autograd.grad(penalty.sum(), there.logprobs)[0].any()


def test_a_penalty_without_a_reference_is_refused(random_tokens):
    tokens = replace(random_tokens(0, [5]), reference_logprobs=None)
    objective = objective_from("ppo", "ratio", "tokens", "penalty")
    with pytest.raises(ValueError, match=r"^reference_logprobs: expected a tensor .*, got None$"):
        objective(tokens)
    assert torch.isfinite(objective_from("ppo", "ratio", "tokens", "no penalty")(tokens).loss)


@pytest.mark.parametrize("recipe", RECIPES, ids="-".join)
def test_distant_policies_give_finite_numbers(random_tokens, recipe):
    tokens = random_tokens(0, [4, 4], coefficients=(0.5, -0.5))
    far = torch.tensor([200.0, -200.0, 30.0, -30.0] * 2)
    tokens = replace(
        tokens, sampled_logprobs=tokens.logprobs.detach() - far, reference_logprobs=tokens.logprobs.detach() + far
    )
    sums = objective_from(*recipe)(tokens)
    assert torch.isfinite(sums.loss)
    assert torch.isfinite(gradient(objective_from(*recipe), tokens)).all()
    assert all(torch.isfinite(value).all() for value in sums.metric_sums.values())
