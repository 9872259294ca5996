"""What a learner minimises. Each objective maps one micro-batch to SUMS over its tokens; the
learner divides once by the global token count, so no split of the batch changes the gradient.

An objective sees only trainable tokens: `logprobs`, `sampled_logprobs`, `coefficients`,
`entropies` are float32 [n], `sequence_ids` int64 [n], `origins` one string per sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pear_ray.algorithms.ratios import pear_weights
from pear_ray.algorithms.statistics import NUM_BINS, NUM_POSITIONS


@dataclass(frozen=True)
class Tokens:
    """The trainable tokens of one micro-batch, with what the model in training says of them."""

    logprobs: Tensor
    entropies: Tensor
    sampled_logprobs: Tensor
    coefficients: Tensor
    sequence_ids: Tensor
    origins: tuple[str, ...]


@dataclass(frozen=True)
class Sums:
    """A loss with gradient, and additive facts (tensors of any shape, without gradient)."""

    loss: Tensor
    facts: dict[str, Tensor]


Objective = Callable[[Tokens], Sums]


@dataclass(frozen=True)
class Nll:
    """Plain SFT: minus the log-probability of every token, times its coefficient."""

    def __call__(self, tokens: Tokens) -> Sums:
        loss = -(tokens.coefficients * tokens.logprobs).sum()
        return Sums(
            loss, {"entropy": tokens.entropies.sum(), "nll": -tokens.logprobs.detach().sum()}
        )


@dataclass(frozen=True)
class PearNll:
    """PEAR-SFT: the same, each token times its detached importance weight (arXiv 2602.01058,
    section 3.2). The numerator of the ratio is the model in training."""

    level: str
    discount: float
    block_size: int
    clip_log_ratio: tuple[float, float]
    clip_log_weight: tuple[float, float]
    sources: tuple[str, ...]

    def __call__(self, tokens: Tokens) -> Sums:
        weights = pear_weights(
            tokens.logprobs,
            tokens.sampled_logprobs,
            tokens.sequence_ids,
            level=self.level,
            discount=self.discount,
            block_size=self.block_size,
            clip_log_ratio=self.clip_log_ratio,
            clip_log_weight=self.clip_log_weight,
        )
        loss = -(weights * tokens.coefficients * tokens.logprobs).sum()
        facts = {"entropy": tokens.entropies.sum(), "nll": -tokens.logprobs.detach().sum()}
        return Sums(loss, facts | self.facts(weights, tokens))

    def facts(self, weights: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        """Additive statistics of the weights; `statistics.weight_summary` reads them."""
        ratios = (tokens.logprobs.detach() - tokens.sampled_logprobs).double()
        low, high = self.clip_log_ratio
        floor, ceiling = self.clip_log_weight
        log_weights = weights.double().log()
        scaled = (log_weights - floor) / (ceiling - floor) * NUM_BINS
        relative, is_first = relative_positions(tokens.sequence_ids)
        position_bin = (relative * NUM_POSITIONS).long().clamp(max=NUM_POSITIONS - 1)
        facts = {
            "weight": weights.double().sum(),
            "weight_squared": weights.double().square().sum(),
            "log_ratio": ratios.sum(),
            "log_ratio_squared": ratios.square().sum(),
            "at_lower_clip": (ratios <= low).sum(),
            "at_upper_clip": (ratios >= high).sum(),
            "at_weight_floor": (log_weights <= floor + 1e-6).sum(),
            "at_weight_ceiling": (log_weights >= ceiling - 1e-6).sum(),
            "weight_histogram": histogram(scaled.long().clamp(0, NUM_BINS - 1), NUM_BINS),
            "weight_by_position": histogram(position_bin, NUM_POSITIONS, weights),
            "tokens_by_position": histogram(position_bin, NUM_POSITIONS),
        }
        owner = torch.tensor(
            [
                self.sources.index(origin) if origin in self.sources else -1
                for origin in tokens.origins
            ],
            device=weights.device,
        )[tokens.sequence_ids]
        for number, source in enumerate(self.sources):
            starts = is_first & (owner == number)
            facts[f"first_weight/{source}"] = (weights * starts).double().sum()
            facts[f"sequences/{source}"] = starts.sum()
        return facts


@dataclass(frozen=True)
class ClippedPolicyGradient:
    """PPO's clipped surrogate with asymmetric bounds (arXiv 1707.06347 eq. 7; the higher upper
    bound is DAPO's, arXiv 2503.14476 section 3.1), summed over tokens.

    The ratio is taken to the log-probs which the rollout engine sampled with, so what the two
    engines differ by is part of the ratio and is corrected by it.
    """

    clip_low: float
    clip_high: float

    def __call__(self, tokens: Tokens) -> Sums:
        # e^20 is far outside every clip; beyond e^88 float32 would give inf, and inf x 0 is NaN.
        log_ratios = (tokens.logprobs - tokens.sampled_logprobs).clamp(-20.0, 20.0)
        ratios = log_ratios.exp()
        clipped = ratios.clamp(1 - self.clip_low, 1 + self.clip_high)
        advantages = tokens.coefficients
        surrogate = torch.minimum(ratios * advantages, clipped * advantages)
        gap = log_ratios.detach().double()
        facts = {
            "entropy": tokens.entropies.sum(),
            "ratio": ratios.detach().double().sum(),
            "ratio_squared": ratios.detach().double().square().sum(),
            "clipped": (surrogate < ratios * advantages).sum(),
            "mismatch": gap.abs().sum(),
            "mismatch_kl": (gap.exp() - 1 - gap).sum(),
        }
        return Sums(-surrogate.sum(), facts)


def relative_positions(sequence_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token stands in its sequence, 0 (first) to below 1, and whether it is first."""
    index = torch.arange(sequence_ids.numel(), device=sequence_ids.device)
    edge = sequence_ids[1:] != sequence_ids[:-1]
    is_first = torch.cat([edge.new_ones(min(1, index.numel())), edge])
    first = torch.where(is_first, index, 0).cummax(0).values
    lengths = torch.bincount(sequence_ids)[sequence_ids]
    return (index - first) / lengths, is_first


def histogram(bins: Tensor, num_bins: int, weights: Tensor | None = None) -> Tensor:
    """Sum of `weights` (or count) per bin, float64 [num_bins]."""
    values = torch.ones_like(bins, dtype=torch.float64) if weights is None else weights.double()
    return torch.zeros(num_bins, dtype=torch.float64, device=bins.device).index_add(0, bins, values)
