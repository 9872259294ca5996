"""How much each token of SFT counts: PEAR's weights, their normalization, and the controls without
which a gain could be a smaller step or noise.

A weigher maps the trainable tokens of a micro-batch to weights float32 [n] without gradient. What
is done with them is a `Normalization`: a change within the micro-batch, and a factor for the whole
step's gradient, known only when all its weights are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pear_ray.losses.inputs import LossInputs
from pear_ray.losses.pear import pear_weights


@dataclass(frozen=True)
class Pear:
    """PEAR's weights (`ratios.pear_weights`), the model in training as numerator."""

    level: str
    discount: float = 0.999
    block_size: int = 4
    clip_log_ratio: tuple[float, float] = (-0.08, 0.3)
    clip_log_weight: tuple[float, float] = (-10.0, 5.0)

    def ratios(self, tokens: LossInputs) -> Tensor:
        """Log-ratio of every token before any clip, float32 [n], without gradient."""
        return tokens.logprobs.detach() - tokens.sampled_logprobs

    def __call__(self, tokens: LossInputs) -> Tensor:
        """Weights, float32 [n], without gradient."""
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
    """Control: the same with each trace's mean log-ratio taken away first, so that only the shape
    within a trace is left and not how implausible the whole trace is. No longer PEAR."""

    def ratios(self, tokens: LossInputs) -> Tensor:
        return super().ratios(centered(tokens))

    def __call__(self, tokens: LossInputs) -> Tensor:
        return super().__call__(centered(tokens))


@dataclass(frozen=True)
class Shuffled(Pear):
    """Control: the same weights dealt to the micro-batch's tokens at random, so that their
    distribution is kept and what they say of a token is not. How a batch was cut matters here."""

    seed: int = 0

    def __call__(self, tokens: LossInputs) -> Tensor:
        weights = super().__call__(tokens)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(weights.numel(), generator=generator)
        return weights[order.to(weights.device)]


def centered(tokens: LossInputs) -> LossInputs:
    """The tokens as if their behavior policy had found each trace as likely as the model."""
    ratios = tokens.logprobs.detach() - tokens.sampled_logprobs
    means = tokens.means_by_sequence(ratios)[tokens.sequence_ids]
    return replace(tokens, sampled_logprobs=tokens.sampled_logprobs + means)


class NoNormalization:
    """No normalization, as in the paper's formula."""

    def applied(self, weights: Tensor, tokens: LossInputs) -> Tensor:
        """The weights that the loss is multiplied by, [n]."""
        return weights

    def factor(self, weight_mean: float) -> float:
        """What the step's gradient is multiplied by, given the mean weight of its tokens."""
        return 1.0


class PerSequence(NoNormalization):
    """Every sequence's weights have mean 1."""

    def applied(self, weights: Tensor, tokens: LossInputs) -> Tensor:
        return weights / tokens.means_by_sequence(weights)[tokens.sequence_ids]


class PerBatch(NoNormalization):
    """The weights of all tokens of a step have mean 1."""

    def factor(self, weight_mean: float) -> float:
        return 1 / weight_mean


class MeanWeightOnly(NoNormalization):
    """Control: every token counts as much as the step's tokens do on average. AdamW hardly sees a
    constant factor, so this shows how far two nearly equal runs end apart."""

    def applied(self, weights: Tensor, tokens: LossInputs) -> Tensor:
        return torch.ones_like(weights)

    def factor(self, weight_mean: float) -> float:
        return weight_mean


Normalization = NoNormalization
