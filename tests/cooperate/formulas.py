"""The methods of `cooperate` as formulas: one process, double precision, one sequence at a time, weights and adapters
as plain tensors.

A completion is (ids, first sampled token, sampling log-probs, advantage); a demonstration is (ids, first and end of the
tokens to learn, behavior log-probs); a step is (completions, demonstrations).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@dataclass
class Parameters:
    """Parameters by name, and the state of their AdamW."""

    tensors: dict[str, torch.Tensor]
    learning_rate: float
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    num_steps: int = 0

    def leaves(self):
        return {name: t.clone().requires_grad_() for name, t in self.tensors.items()}

    def adamw(self, gradients, optimizer):
        """One step, with decoupled weight decay."""
        beta1, beta2 = optimizer["betas"]
        self.num_steps += 1
        for name, gradient in gradients.items():
            mean = self.means.get(name, 0.0) * beta1 + (1 - beta1) * gradient
            square = self.squares.get(name, 0.0) * beta2 + (1 - beta2) * gradient**2
            self.means[name], self.squares[name] = mean, square
            value = self.tensors[name] * (1 - self.learning_rate * optimizer["weight_decay"])
            denominator = (square / (1 - beta2**self.num_steps)).sqrt() + optimizer["eps"]
            step = self.learning_rate * (mean / (1 - beta1**self.num_steps)) / denominator
            self.tensors[name] = value - step


class Network:
    """A model as a function of its parameters and adapters."""

    def __init__(self, path, lora):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        self.scaling = lora["alpha"] / lora["rank"]

    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def merge(self, weights, adapters):
        merged = dict(weights)
        for name in weights:
            layer = name.removesuffix(".weight")
            if layer + ".A" in adapters:
                product = adapters[layer + ".B"] @ adapters[layer + ".A"]
                merged[name] = weights[name] + self.scaling * product
        return merged

    def logprobs(self, weights, adapters, ids):
        """Log-prob of each token but the first, and the entropy of its distribution."""
        inputs = (torch.from_numpy(ids)[None],)
        logits = functional_call(self.model, self.merge(weights, adapters), inputs).logits[0]
        table = logits[:-1].log_softmax(-1)
        chosen = table[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])]
        return chosen, -(table.exp() * table).sum(-1).detach()


def clip_by_norm(gradients, max_norm):
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    factor = min(1.0, max_norm / (norm + 1e-6))
    return {name: g * factor for name, g in gradients.items()}


def ppo(logprob, sampled_logprob, advantage):
    ratio = torch.exp(logprob - sampled_logprob)
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def pear_token_weights(logprobs, behavior_logprobs, discount, low, high):
    """discount^(T-t) times the product of the clipped ratios after t."""
    pairs = zip(logprobs, behavior_logprobs, strict=True)
    deltas = [min(max(float(a - b), low), high) for a, b in pairs]
    num_tokens = len(deltas)
    weights = []
    for t in range(1, num_tokens + 1):
        log_weight = (num_tokens - t) * math.log(discount) + sum(deltas[t:])
        weights.append(math.exp(min(max(log_weight, -10.0), 5.0)))
    return weights


def rl_losses(network, weights, adapters, completions):
    """The loss of each sampled token."""
    losses = []
    for ids, start, sampled_logprobs, advantage in completions:
        logprobs, _ = network.logprobs(weights, adapters, ids)
        for t in range(start, len(ids)):
            losses.append(ppo(logprobs[t - 1], float(sampled_logprobs[t - start]), advantage))
    return losses


def sft_losses(network, weights, adapters, demonstrations, settings):
    """The loss of each demonstrated token."""
    losses = []
    for ids, start, end, behavior_logprobs in demonstrations:
        logprobs, entropies = network.logprobs(weights, adapters, ids)
        logprobs, entropies = logprobs[start - 1 : end - 1], entropies[start - 1 : end - 1]
        factors = [1.0] * len(logprobs)
        if settings["level"] == "token":
            bounds = settings["clip_log_ratio"]
            factors = pear_token_weights(logprobs.detach(), behavior_logprobs, settings["discount"], *bounds)
        if settings["objective"]["type"] == "trsft":
            alpha = settings["objective"]["alpha"]
            trust = [min(1.0, math.exp(float(x)) / alpha) for x in logprobs]
            factors = [f * t for f, t in zip(factors, trust, strict=True)]
        if settings["entropy_top_frac"] < 1:
            num_chosen = math.ceil(settings["entropy_top_frac"] * len(logprobs))
            order = np.argsort(-entropies.numpy(), kind="stable")
            chosen = set(order[:num_chosen].tolist())
            factors = [f * (t in chosen) for t, f in enumerate(factors)]
        losses += [-f * x for f, x in zip(factors, logprobs, strict=True)]
    return losses


def mean(losses):
    return sum(losses) / len(losses)


def gradients_of(loss, leaves):
    gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g
        for (name, leaf), g in zip(leaves.items(), gradients, strict=True)
    }


def update(parameters, loss, leaves, optimizer):
    gradients = clip_by_norm(gradients_of(loss, leaves), optimizer["max_grad_norm"])
    parameters.adamw(gradients, optimizer)


def update_both(policy, adapters, gradients, optimizer):
    """Update weights and adapters with gradients that are clipped together."""
    clipped = clip_by_norm(gradients, optimizer["max_grad_norm"])
    policy.adamw({name: clipped[name] for name in policy.tensors}, optimizer)
    adapters.adamw({name: clipped[name] for name in adapters.tensors}, optimizer)


def bridge(network, policy, shadow, adapters, steps, settings, optimizer, rl_weight, refresh_steps):
    """The three updates of arXiv 2509.06948, section 3.2."""
    for number, (completions, demonstrations) in enumerate(steps):
        if number and number % refresh_steps == 0:
            shadow.tensors = {name: t.clone() for name, t in policy.tensors.items()}
        theta, hat, w = policy.leaves(), shadow.leaves(), adapters.leaves()
        rl = mean(rl_losses(network, theta, w, completions))
        sft = mean(sft_losses(network, theta, w, demonstrations, settings))
        rl_of_shadow = mean(rl_losses(network, hat, w, completions))
        theta_gradients = gradients_of((1 - rl_weight) * sft + rl_weight * rl, theta)
        gain = rl - rl_of_shadow
        w_gradients = gradients_of((1 - rl_weight) * sft + rl_weight * gain, w)
        update(shadow, rl_of_shadow, hat, optimizer)
        update_both(policy, adapters, theta_gradients | w_gradients, optimizer)


def weighted_sum(network, policy, adapters, steps, settings, optimizer, rl_weight):
    """rl_weight RL + (1 - rl_weight) SFT, for weights and adapters, if any."""
    for completions, demonstrations in steps:
        theta, w = policy.leaves(), adapters.leaves()
        rl = mean(rl_losses(network, theta, w, completions))
        sft = mean(sft_losses(network, theta, w, demonstrations, settings))
        loss = rl_weight * rl + (1 - rl_weight) * sft
        update_both(policy, adapters, gradients_of(loss, theta | w), optimizer)


def trapo(network, policy, steps, settings, optimizer):
    """The mean over all tokens: TrSFT for prefixes, RL for continuations."""
    for completions, prefixes in steps:
        theta = policy.leaves()
        losses = rl_losses(network, theta, {}, completions)
        losses += sft_losses(network, theta, {}, prefixes, settings)
        update(policy, mean(losses), theta, optimizer)


def alternate(network, policy, steps, settings, optimizer, frozen_frac):
    """A step on rollouts, then one on demonstrations that freezes what the first changed most."""
    for completions, demonstrations in steps:
        before = dict(policy.tensors)
        theta = policy.leaves()
        update(policy, mean(rl_losses(network, theta, {}, completions)), theta, optimizer)
        after_rl = dict(policy.tensors)
        theta = policy.leaves()
        sft = mean(sft_losses(network, theta, {}, demonstrations, settings))
        update(policy, sft, theta, optimizer)
        for name, value in after_rl.items():
            change = (value - before[name]).abs().flatten()
            num_frozen = int(frozen_frac * change.numel())
            if num_frozen:
                smallest = change.sort(descending=True).values[num_frozen - 1]
                frozen = ((change >= smallest) & (change > 0)).view(value.shape)
                policy.tensors[name] = torch.where(frozen, value, policy.tensors[name])
