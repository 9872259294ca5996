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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pear_ray.losses.inputs import LossInputs


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
    """Return the importance weight of every response token, detached and without a host sync.

    Args:
        target_logprobs: float [tokens], nats, under the model in training.
        behavior_logprobs: float [tokens], nats, under the policy that wrote the tokens.
        sequence_ids: int [tokens]; the tokens of one response are contiguous and share an id that
            differs from the next response's.
        level: "token", "block" or "sequence".
        discount: per token of suffix, in (0, 1]; ignored at level "sequence".
        block_size: tokens per block, counted from the start of each response.
        clip_log_ratio: bounds of delta_t, before any sum.
        clip_log_weight: bounds of the log-weight.

    Returns:
        Tensor of the shape and dtype of `target_logprobs`.

    Raises:
        ValueError: unknown level, shapes that differ, or a setting out of range.
    """
    if level not in LOG_WEIGHTS:
        raise ValueError(f"level: expected one of {sorted(LOG_WEIGHTS)}, got {level!r}")
    shapes = [tuple(t.shape) for t in (target_logprobs, behavior_logprobs, sequence_ids)]
    if len(set(shapes)) > 1 or target_logprobs.ndim != 1:
        raise ValueError(f"expected three 1-D tensors of one shape, got shapes {shapes}")
    if not 0 < discount <= 1:
        raise ValueError(f"discount: expected a number in (0, 1], got {discount}")
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    if target_logprobs.numel() == 0:
        return torch.empty_like(target_logprobs)
    delta = (target_logprobs.detach().double() - behavior_logprobs.detach().double()).clamp(*clip_log_ratio)
    segments = SequenceSegments.of(delta, sequence_ids)
    log_weights = LOG_WEIGHTS[level](segments, math.log(discount), block_size)
    return log_weights.clamp(*clip_log_weight).exp().to(target_logprobs.dtype)


@dataclass(frozen=True)
class SequenceSegments:
    """Prefix sums of delta over a pack, with the bounds of each token's response.

    All fields are [tokens]: `prefix` float64 inclusive sums over the whole pack, `delta` float64; int64 positions in
    the pack: `index` of the token, `first` and `last` of its response.
    """

    prefix: Tensor
    delta: Tensor
    first: Tensor
    last: Tensor
    index: Tensor

    @classmethod
    def of(cls, delta: Tensor, sequence_ids: Tensor) -> SequenceSegments:
        num_tokens = delta.numel()
        index = torch.arange(num_tokens, device=delta.device)
        edge = sequence_ids[1:] != sequence_ids[:-1]
        end = torch.ones(1, dtype=torch.bool, device=delta.device)
        first = torch.where(torch.cat([end, edge]), index, 0).cummax(0).values
        last = torch.where(torch.cat([edge, end]), index, num_tokens).flip(0).cummin(0).values.flip(0)
        return cls(delta.cumsum(0), delta, first, last, index)

    def sum_after(self, position: Tensor) -> Tensor:
        """Return the sum of delta over the tokens of the same response after `position`."""
        return self.prefix[self.last] - self.prefix[position]


def _token(segments: SequenceSegments, log_discount: float, block_size: int) -> Tensor:
    remaining = (segments.last - segments.index).double()
    return remaining * log_discount + segments.sum_after(segments.index)


def _block(segments: SequenceSegments, log_discount: float, block_size: int) -> Tensor:
    block = (segments.index - segments.first) // block_size
    block_end = torch.minimum(segments.first + (block + 1) * block_size - 1, segments.last)
    remaining = (segments.last - block_end).double()
    return remaining * log_discount + segments.sum_after(block_end)


def _sequence(segments: SequenceSegments, log_discount: float, block_size: int) -> Tensor:
    return segments.sum_after(segments.first) + segments.delta[segments.first]


LOG_WEIGHTS = {"token": _token, "block": _block, "sequence": _sequence}


@dataclass(frozen=True)
class Pear:
    """`pear_weights` of a micro-batch's trainable tokens, float32 [n], detached."""

    level: str
    discount: float = 0.999
    block_size: int = 4
    clip_log_ratio: tuple[float, float] = (-0.08, 0.3)
    clip_log_weight: tuple[float, float] = (-10.0, 5.0)

    def log_ratios(self, tokens: LossInputs) -> Tensor:
        """Return log(pi_theta / pi_beta) of every token before any clip, float32 [n], detached."""
        return tokens.logprobs.detach() - tokens.sampled_logprobs

    def __call__(self, tokens: LossInputs) -> Tensor:
        return pear_weights(
            tokens.logprobs,
            tokens.sampled_logprobs,
            tokens.sequence_ids,
            level=self.level,
            discount=self.discount,
            block_size=self.block_size,
            clip_log_ratio=self.clip_log_ratio,
            clip_log_weight=self.clip_log_weight,
        )


@dataclass(frozen=True)
class Centered(Pear):
    """Control: PEAR after the mean log-ratio of each sequence is subtracted, so that only the differences within a
    sequence are left, not how implausible it is as a whole."""

    def log_ratios(self, tokens: LossInputs) -> Tensor:
        return super().log_ratios(center_log_ratios(tokens))

    def __call__(self, tokens: LossInputs) -> Tensor:
        return super().__call__(center_log_ratios(tokens))


@dataclass(frozen=True)
class Shuffled(Pear):
    """Control: PEAR's weights permuted over the tokens of the micro-batch, which keeps their distribution and nothing
    else. Depends on how a batch is cut into micro-batches."""

    seed: int = 0

    def __call__(self, tokens: LossInputs) -> Tensor:
        weights = super().__call__(tokens)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(weights.numel(), generator=generator)
        return weights[order.to(weights.device)]


def center_log_ratios(tokens: LossInputs) -> LossInputs:
    """Return the tokens with behavior log-probs shifted so that each sequence's log-ratios have mean 0."""
    log_ratios = tokens.logprobs.detach() - tokens.sampled_logprobs
    means = tokens.means_by_sequence(log_ratios)[tokens.sequence_ids]
    return replace(tokens, sampled_logprobs=tokens.sampled_logprobs + means)


class NoNormalization:
    """Weights as in the paper's formula; the base of the other normalizations.

    `apply` changes weights within a micro-batch; `grad_scale` scales the gradient of the whole step, when the mean
    weight of all its tokens is known.
    """

    def apply(self, weights: Tensor, tokens: LossInputs) -> Tensor:
        """Return the weights that the loss is multiplied by, [n]."""
        return weights

    def grad_scale(self, mean_weight: float) -> float:
        """Return the factor of the step's gradient, given the mean weight of its tokens."""
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
