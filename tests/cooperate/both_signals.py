"""Stage `cooperate` as its formulas say it: one process, double precision, one sequence after
another, weights and adapters as plain tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@dataclass
class Values:
    """Parameters by name, and the running means of their AdamW."""

    tensors: dict[str, torch.Tensor]
    rate: float
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    num_steps: int = 0

    def leaves(self):
        return {name: t.clone().requires_grad_() for name, t in self.tensors.items()}

    def adamw(self, gradients, optimizer):
        """One step, weight decay apart from the gradient."""
        beta1, beta2 = optimizer["betas"]
        self.num_steps += 1
        for name, gradient in gradients.items():
            mean = self.means.get(name, 0.0) * beta1 + (1 - beta1) * gradient
            square = self.squares.get(name, 0.0) * beta2 + (1 - beta2) * gradient**2
            self.means[name], self.squares[name] = mean, square
            value = self.tensors[name] * (1 - self.rate * optimizer["weight_decay"])
            corrected = (square / (1 - beta2**self.num_steps)).sqrt() + optimizer["eps"]
            value = value - self.rate * (mean / (1 - beta1**self.num_steps)) / corrected
            self.tensors[name] = value


def clipped(gradients, largest):
    """Gradients with their common norm at most `largest`."""
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    factor = min(1.0, largest / (norm + 1e-6))
    return {name: g * factor for name, g in gradients.items()}


class Network:
    """A model's function of its parameters, with or without adapters."""

    def __init__(self, path, lora=None):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        self.scaling = None if lora is None else lora["alpha"] / lora["rank"]

    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def logits(self, weights, adapters, ids):
        """Of one sequence, [tokens, vocabulary]."""
        effective = dict(weights)
        for name in weights:
            layer = name.removesuffix(".weight")
            if layer + ".A" in adapters:
                product = adapters[layer + ".B"] @ adapters[layer + ".A"]
                effective[name] = weights[name] + self.scaling * product
        return functional_call(self.model, effective, (torch.from_numpy(ids)[None],)).logits[0]

    def logprobs(self, weights, adapters, ids):
        """Of every token but the first, and the entropies of the distributions they come from."""
        table = self.logits(weights, adapters, ids)[:-1].log_softmax(-1)
        own = table[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])]
        return own, -(table.exp() * table).sum(-1).detach()


def ppo(logprob, sampled, advantage):
    ratio = torch.exp(logprob - sampled)
    bounded = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    return -torch.minimum(ratio * advantage, bounded * advantage)


def pear_token_weights(logprobs, behavior, discount, low, high):
    """gamma^(T-t) times the product of the clipped ratios behind t."""
    deltas = [min(max(float(a - b), low), high) for a, b in zip(logprobs, behavior, strict=True)]
    last = len(deltas)
    found = []
    for t in range(1, last + 1):
        log_weight = (last - t) * math.log(discount) + sum(deltas[t:])
        found.append(math.exp(min(max(log_weight, -10.0), 5.0)))
    return found


def rl_losses(network, weights, adapters, answers):
    """Of every own token of every answer. An answer: ids, first own token, sampled, advantage."""
    losses = []
    for ids, first, sampled, advantage in answers:
        logprobs, _ = network.logprobs(weights, adapters, ids)
        for place in range(first, len(ids)):
            losses.append(ppo(logprobs[place - 1], float(sampled[place - first]), advantage))
    return losses


def trace_losses(network, weights, adapters, traces, how):
    """Of every token of every trace. A trace: ids, first and last token that are learned,
    behavior log-probs."""
    losses = []
    for ids, first, end, behavior in traces:
        logprobs, entropies = network.logprobs(weights, adapters, ids)
        own = logprobs[first - 1 : end - 1]
        factors = [1.0] * len(own)
        if how["level"] == "token":
            factors = pear_token_weights(
                own.detach(), behavior, how["discount"], *how["clip_log_ratio"]
            )
        if how["objective"] == "trsft":
            trust = [min(1.0, math.exp(float(x)) / how["trsft_alpha"]) for x in own]
            factors = [f * t for f, t in zip(factors, trust, strict=True)]
        if how["entropy_top_frac"] < 1:
            uncertain = entropies[first - 1 : end - 1]
            most = math.ceil(how["entropy_top_frac"] * len(own))
            chosen = set(np.argsort(-uncertain.numpy(), kind="stable")[:most].tolist())
            factors = [f * (t in chosen) for t, f in enumerate(factors)]
        losses += [-f * x for f, x in zip(factors, own, strict=True)]
    return losses


def mean(losses):
    return sum(losses) / len(losses)


def gradients_of(loss, leaves):
    found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g
        for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }


def bridge(network, policy, shadow, adapters, steps, how, optimizer, share, refresh=0):
    """The three updates of METHODS 3.2 / arXiv 2509.06948, step after step."""
    for number, (answers, traces) in enumerate(steps):
        if refresh and number and number % refresh == 0:
            shadow.tensors = {name: t.clone() for name, t in policy.tensors.items()}
        theta, hat, w = policy.leaves(), shadow.leaves(), adapters.leaves()
        rl = mean(rl_losses(network, theta, w, answers))
        sft = mean(trace_losses(network, theta, w, traces, how))
        rl_of_shadow = mean(rl_losses(network, hat, w, answers))
        of_theta = gradients_of((1 - share) * sft + share * rl, theta)
        of_w = gradients_of((1 - share) * sft + share * (rl - rl_of_shadow), w)
        of_hat = gradients_of(rl_of_shadow, hat)
        both = clipped(of_theta | of_w, optimizer["max_grad_norm"])
        policy.adamw({name: both[name] for name in of_theta}, optimizer)
        adapters.adamw({name: both[name] for name in of_w}, optimizer)
        shadow.adamw(clipped(of_hat, optimizer["max_grad_norm"]), optimizer)


def summed(network, policy, adapters, steps, how, optimizer, share):
    """share RL + (1 - share) SFT, of weights and of adapters where there are any."""
    for answers, traces in steps:
        theta, w = policy.leaves(), adapters.leaves()
        parts = []
        if share > 0:
            parts.append(share * mean(rl_losses(network, theta, w, answers)))
        if share < 1:
            parts.append((1 - share) * mean(trace_losses(network, theta, w, traces, how)))
        both = clipped(gradients_of(sum(parts), theta | w), optimizer["max_grad_norm"])
        policy.adamw({name: both[name] for name in theta}, optimizer)
        adapters.adamw({name: both[name] for name in w}, optimizer)


def trapo(network, policy, steps, how, optimizer):
    """Every token alike: beginnings by TrSFT, what follows by RL."""
    for answers, traces in steps:
        theta = policy.leaves()
        losses = rl_losses(network, theta, {}, answers)
        losses += trace_losses(network, theta, {}, traces, how)
        policy.adamw(
            clipped(gradients_of(mean(losses), theta), optimizer["max_grad_norm"]), optimizer
        )


def alternate(network, policy, steps, how, optimizer, frozen_frac):
    """A step on rollouts, then one on traces that leaves alone what the first moved most."""
    for answers, traces in steps:
        before = dict(policy.tensors)
        theta = policy.leaves()
        gradients = gradients_of(mean(rl_losses(network, theta, {}, answers)), theta)
        policy.adamw(clipped(gradients, optimizer["max_grad_norm"]), optimizer)
        after = dict(policy.tensors)
        if not traces:
            continue
        theta = policy.leaves()
        gradients = gradients_of(mean(trace_losses(network, theta, {}, traces, how)), theta)
        policy.adamw(clipped(gradients, optimizer["max_grad_norm"]), optimizer)
        for name, value in after.items():
            moved = (value - before[name]).abs().flatten()
            num_held = int(frozen_frac * moved.numel())
            if num_held:
                held = (moved >= moved.sort(descending=True).values[num_held - 1]) & (moved > 0)
                held = held.view(value.shape)
                policy.tensors[name] = torch.where(held, value, policy.tensors[name])
