"""What RL minimizes: a loss for each token (`policy_losses`), a correction for tokens that another
engine sampled, perhaps a KL penalty, and the average that is meant.

    loss = average over the step's tokens of  weight_t loss_t + coefficient KL_t

As every objective these give SUMS over a micro-batch, which the learner divides once by the global
number of trainable tokens T. An average of another kind is a factor for each token that undoes
this division.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pear_ray.losses.inputs import LossInputs, LossOutputs
from pear_ray.losses.policy_losses import MAX_LOG_RATIO, PolicyLoss, ratios_of


@dataclass(frozen=True)
class RatioInLoss:
    """The old policy is the one that sampled, by the log-probs of the engine that did: what the two
    engines differ by is part of the loss's ratio, and within its clips is corrected by it."""

    def log_ratios(self, tokens: LossInputs) -> Tensor:
        """The loss's log-ratio of each token, [n], with gradient."""
        return tokens.logprobs - tokens.sampled_logprobs

    def weights(self, tokens: LossInputs) -> Tensor:
        """What each token's loss is multiplied by, [n], without gradient."""
        return torch.ones_like(tokens.sampled_logprobs)

    def facts(self, tokens: LossInputs) -> dict[str, Tensor]:
        """Additive statistics of the correction."""
        return {}


@dataclass(frozen=True)
class TruncatedIS:
    """Truncated importance sampling (Yao et al., "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training", 2025): each token's loss times sg[min(pi / pi_sampled, cap)].

    The old policy is the model itself as it enters the step: a batch is used for one optimizer
    step, so the loss's ratio is 1 wherever it is read and only its gradient is left. Clips of the
    loss hold nothing here; the cap bounds what a token that is off-policy may weigh.
    """

    cap: float

    def log_ratios(self, tokens: LossInputs) -> Tensor:
        """The loss's log-ratio of each token, [n]: 0, with the gradient of the log-prob."""
        return tokens.logprobs - tokens.logprobs.detach()

    def weights(self, tokens: LossInputs) -> Tensor:
        """What each token's loss is multiplied by, [n], without gradient."""
        return ratios_of(tokens.logprobs.detach() - tokens.sampled_logprobs).clamp(max=self.cap)

    def facts(self, tokens: LossInputs) -> dict[str, Tensor]:
        """`weight` and `weight_squared`, of which (sum w)^2 / sum w^2 / T is the effective sample
        size, and `truncated`, the tokens at the cap."""
        weights = self.weights(tokens).double()
        gaps = tokens.logprobs.detach() - tokens.sampled_logprobs
        return {
            "weight": weights.sum(),
            "weight_squared": weights.square().sum(),
            "truncated": (ratios_of(gaps) > self.cap).sum(),
        }


@dataclass(frozen=True)
class TokenMean:
    """1/T sum_t: every token of the step counts alike (DAPO, arXiv 2503.14476 section 3.3)."""

    def factors(self, tokens: LossInputs) -> Tensor:
        """What each token's loss is multiplied by before the learner divides by T, [n]."""
        return torch.ones_like(tokens.sampled_logprobs)


@dataclass(frozen=True)
class SequenceMean:
    """1/N sum_s 1/|s| sum_{t in s}: every one of the N sequences counts alike, whatever its length
    (GRPO, arXiv 2402.03300 eq. 3)."""

    def factors(self, tokens: LossInputs) -> Tensor:
        """T / (N |s|) for each token of s, [n]."""
        lengths = tokens.lengths()[tokens.sequence_ids]
        return tokens.num_tokens_global / (tokens.num_sequences_global * lengths)


@dataclass(frozen=True)
class ConstantLength:
    """1/(N length) sum_t: a token counts alike in every step, however many there are (Dr. GRPO,
    arXiv 2503.20783 section 3.2). `length` is a number of tokens, as a rule the longest answer
    that may be sampled."""

    length: int

    def factors(self, tokens: LossInputs) -> Tensor:
        """T / (N length) for each token, [n]."""
        factor = tokens.num_tokens_global / (tokens.num_sequences_global * self.length)
        return torch.full_like(tokens.sampled_logprobs, factor)


@dataclass(frozen=True)
class KlToReference:
    """coefficient (e^d - d - 1), d = log pi_ref - log pi: the estimate "k3" of KL(pi || pi_ref)
    from tokens that pi sampled, at least 0 for each of them (arXiv 2402.03300 eq. 4).

    Its gradient by log pi is coefficient (1 - e^d). It is not multiplied by the correction's
    weight. d beyond 20 is held there and has no gradient.
    """

    coefficient: float

    def divergences(self, tokens: LossInputs) -> Tensor:
        """e^d - d - 1 of each token in nats, float32 [n], with gradient.

        Raises:
            ValueError: the tokens came without `reference_logprobs`.
        """
        if tokens.reference_logprobs is None:
            raise ValueError(
                "a KL penalty to a reference: read tokens without reference_logprobs; expected the"
                " reference policy's log-prob of each"
            )
        gaps = (tokens.reference_logprobs - tokens.logprobs).clamp(max=MAX_LOG_RATIO)
        return gaps.expm1() - gaps


@dataclass(frozen=True)
class PolicyGradient:
    """The objective of an RL step.

    Facts of every one, summed over tokens: `entropy` in nats; `ratio` and `ratio_squared` of
    pi / pi_sampled, of which (sum R)^2 / sum R^2 / T is the effective sample size; `clipped`, the
    tokens that a bound of the loss changed; `mismatch`, |log-ratio| in nats; `mismatch_kl`,
    R - 1 - log R, an estimate of KL(pi_sampled || pi). Others are the correction's, and
    `reference_kl`, e^d - d - 1, with a KL penalty.
    """

    loss: PolicyLoss
    correction: RatioInLoss | TruncatedIS
    aggregation: TokenMean | SequenceMean | ConstantLength
    penalty: KlToReference | None = None
    top_k = 0

    def __call__(self, tokens: LossInputs) -> LossOutputs:
        terms = self.loss(self.correction.log_ratios(tokens), tokens)
        losses = self.correction.weights(tokens) * terms.losses
        facts = sampling_facts(tokens) | self.correction.facts(tokens)
        facts["clipped"] = terms.clipped.sum()
        if self.penalty is not None:
            divergences = self.penalty.divergences(tokens)
            losses = losses + self.penalty.coefficient * divergences
            facts["reference_kl"] = divergences.detach().double().sum()
        return LossOutputs((self.aggregation.factors(tokens) * losses).sum(), facts)

    def factor(self, facts: Mapping[str, np.ndarray], num_tokens: int) -> float:
        """The step's gradient is taken as it is."""
        return 1.0


def sampling_facts(tokens: LossInputs) -> dict[str, Tensor]:
    """How the model in training stands to the policy that sampled, additive, in float64."""
    gaps = (tokens.logprobs.detach() - tokens.sampled_logprobs).double()
    gaps = gaps.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratios = gaps.exp()
    return {
        "entropy": tokens.entropies.sum(),
        "ratio": ratios.sum(),
        "ratio_squared": ratios.square().sum(),
        "mismatch": gaps.abs().sum(),
        "mismatch_kl": (gaps.expm1() - gaps).sum(),
    }
