"""PEAR's importance weights (arXiv 2602.01058, sections 3.2-3.5 and 3.7), their normalization, and controls that
separate their effect from that of smaller steps and of noise.

With delta_t = log pi_theta(y_t) - log pi_beta(y_t), clipped per token, and t = 1..T over the response, the log-weight
of a token is

    token     (T - t) ln(discount) + sum of delta_j over j > t
    block     (T - e) ln(discount) + sum of delta_j over j > e,  e = last token of t's block
    sequence  sum of delta_j over all j

clipped again, then exponentiated. The suffix excludes the token itself, so the last token's weight is always 1 at level
"token". Sums run in float64: a pack may hold 10^5 tokens, and a difference of float32 prefix sums would lose what the
first clip keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pear_ray.losses import LossInputs, sequence_bounds

LEVELS = ["block", "sequence", "token"]


def pear_weights(
    target_logprobs: Tensor,
    behavior_logprobs: Tensor,
    sequence_ids: Tensor,
    *,
    level: str,
    discount: float = 0.999,
    block_size: int = 4,
    clip_log_ratio: tuple[float, float] = (-0.08, 0.3),
    clip_log_weight: tuple[float, float] = (-10.0, 5.0),
) -> Tensor:
    """Return the importance weight of every response token, detached and without a host sync, in the shape and dtype of
    `target_logprobs`.

    Args:
        target_logprobs: float [tokens], nats, under the model in training.
        behavior_logprobs: float [tokens], nats, under the policy that wrote the tokens.
        sequence_ids: int [tokens]; the tokens of one response are contiguous and share an id that differs from the next
            response's.
        level: "token", "block" or "sequence".
        discount: per token of suffix, in (0, 1]; ignored at level "sequence".
        block_size: tokens per block, counted from the start of each response.
        clip_log_ratio: bounds of delta_t, before any sum.
        clip_log_weight: bounds of the log-weight.

    Raises:
        ValueError: unknown level, shapes that differ, or a setting out of range.
    """
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {LEVELS}, got {level!r}")
    shapes = [tuple(t.shape) for t in (target_logprobs, behavior_logprobs, sequence_ids)]
    if len(set(shapes)) > 1 or target_logprobs.ndim != 1:
        raise ValueError(f"expected three 1-D tensors of one shape, got shapes {shapes}")
    if not 0 < discount <= 1:
        raise ValueError(f"discount: expected a number in (0, 1], got {discount}")
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    delta = (target_logprobs.detach().double() - behavior_logprobs.detach().double()).clamp(*clip_log_ratio)
    prefix = delta.cumsum(0)
    index, first, last = sequence_bounds(sequence_ids)
    if level == "sequence":
        log_weights = prefix[last] - prefix[first] + delta[first]
    else:
        size = 1 if level == "token" else block_size
        block_end = torch.minimum(first + ((index - first) // size + 1) * size - 1, last)
        log_weights = (last - block_end).double() * math.log(discount) + (prefix[last] - prefix[block_end])
    return log_weights.clamp(*clip_log_weight).exp().to(target_logprobs.dtype)


@dataclass(frozen=True)
class Pear:
    """`pear_weights` of a micro-batch's trainable tokens, float32 [n], detached."""

    level: str
    discount: float = 0.999
    block_size: int = 4
    clip_log_ratio: tuple[float, float] = (-0.08, 0.3)
    clip_log_weight: tuple[float, float] = (-10.0, 5.0)

    def prepared(self, tokens: LossInputs) -> LossInputs:
        """Return the tokens with the log-ratios that are weighed."""
        return tokens

    def __call__(self, tokens: LossInputs) -> Tensor:
        tokens = self.prepared(tokens)
        settings = {field.name: getattr(self, field.name) for field in fields(Pear)}
        return pear_weights(tokens.logprobs, tokens.sampled_logprobs, tokens.sequence_ids, **settings)


@dataclass(frozen=True)
class Centered(Pear):
    """Control: PEAR after the mean log-ratio of each sequence is subtracted, so that only the differences within a
    sequence are left, not how implausible it is as a whole."""

    def prepared(self, tokens: LossInputs) -> LossInputs:
        means = tokens.means_by_sequence(tokens.log_ratios())[tokens.sequence_ids]
        return replace(tokens, sampled_logprobs=tokens.sampled_logprobs + means)


@dataclass(frozen=True)
class Shuffled(Pear):
    """Control: PEAR's weights permuted over the tokens of the micro-batch, which keeps their distribution and nothing
    else. Depends on how a batch is cut into micro-batches."""

    seed: int = 0

    def __call__(self, tokens: LossInputs) -> Tensor:
        weights = super().__call__(tokens)
        order = torch.randperm(weights.numel(), generator=torch.Generator().manual_seed(self.seed))
        return weights[order.to(weights.device)]


class NoNormalization:
    """Weights as in the paper's formula; the base of the other normalizations."""

    def apply(self, weights: Tensor, tokens: LossInputs) -> Tensor:
        """Return the weights of a micro-batch that the loss is multiplied by, [n]."""
        return weights

    def grad_scale(self, mean_weight: float) -> float:
        """Return the factor of the whole step's gradient, given the mean weight of its tokens."""
        return 1.0


class PerSequence(NoNormalization):
    """Every sequence's weights have mean 1."""

    def apply(self, weights: Tensor, tokens: LossInputs) -> Tensor:
        return weights / tokens.means_by_sequence(weights)[tokens.sequence_ids]


class PerBatch(NoNormalization):
    """The weights of all tokens of a step have mean 1."""

    def grad_scale(self, mean_weight: float) -> float:
        return 1 / mean_weight


class MeanWeightOnly(NoNormalization):
    """Control: every token gets the step's mean weight. AdamW is nearly invariant to a constant factor, so this
    measures how far apart two nearly equal runs end."""

    def apply(self, weights: Tensor, tokens: LossInputs) -> Tensor:
        return torch.ones_like(weights)

    def grad_scale(self, mean_weight: float) -> float:
        return mean_weight
