"""RL objectives: advantages, a per-token loss, a correction for engine/trainer log-prob mismatch, an optional KL
penalty, and the mode of averaging.

    loss = average over the step's tokens of  weight_t loss_t + coefficient KL_t

Like all objectives these return SUMS over a micro-batch, and the learner divides once by the global number of trainable
tokens T. Averages other than the token mean scale each token to undo that division.

A per-token loss maps the log-ratios log(pi / pi_old) of the trainable tokens, float32 [n] with gradient, to one loss
each; the correction defines pi_old. A is the advantage, `LossInputs.coefficients`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pear_ray.losses import LossInputs, LossOutputs, Objective

# Far outside every clip; beyond e^88 float32 overflows to inf, and inf x 0 is NaN.
MAX_LOG_RATIO = 20.0
# Keeps groups without spread at zero instead of dividing rounding noise by zero.
MIN_STD = 1e-6
ADVANTAGES = ["dr_grpo", "grpo", "nft", "rloo"]


def group_advantages(rewards_G: Tensor, kind: str) -> Tensor:
    """Return the advantage of each completion over its group, [group size]; all zero if all rewards are equal.

    grpo     (r - mean) / std, with the sample standard deviation (DeepSeekMath, arXiv 2402.03300)
    dr_grpo  r - mean (arXiv 2503.20783: without the division, groups do not count more for being easy or hard)
    rloo     r minus the mean of the OTHER completions (arXiv 2402.14740)
    nft      for `Nft` only, which needs the group's pass rate and the sign: the mean if correct, minus the mean if
             wrong (arXiv 2505.18116)

    `rewards_G` is float [group size], at least 2; for nft each 0 (wrong) or 1 (correct).

    Raises:
        ValueError: unknown kind, a group of fewer than two, or a non-binary reward for nft.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"advantage: expected one of {ADVANTAGES}, got {kind!r}")
    if rewards_G.ndim != 1 or rewards_G.numel() < 2:
        raise ValueError(f"rewards_G: expected a 1-D tensor of at least 2, got shape {tuple(rewards_G.shape)}")
    if kind == "nft":
        correct_G = rewards_G == 1
        if not (correct_G | (rewards_G == 0)).all():
            raise ValueError(f"advantage 'nft': expected rewards of 0 or 1, got {rewards_G.tolist()}")
        mean = rewards_G.mean()
        return torch.where(correct_G, mean, -mean) if 0 < mean < 1 else torch.zeros_like(rewards_G)
    # Relative to the first reward, equal rewards are exactly 0; their mean may be off by rounding.
    shifted_G = rewards_G - rewards_G[0]
    centered_G = shifted_G - shifted_G.mean()
    size = centered_G.numel()
    if kind == "grpo":
        return centered_G / ((centered_G.square().sum() / (size - 1)).sqrt() + MIN_STD)
    return centered_G * (size / (size - 1)) if kind == "rloo" else centered_G


class TokenLosses(NamedTuple):
    """`losses` float32 [n] with gradient, and `clipped` bool [n], tokens changed by a bound."""

    losses: Tensor
    clipped: Tensor


def exp_ratios(log_ratios: Tensor) -> Tensor:
    """Return e^x with x clamped to [-20, 20], without gradient beyond."""
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@dataclass(frozen=True)
class PpoClip:
    """-min(R A, clip(R, 1 - clip_low, 1 + clip_high) A), R the token's ratio: PPO's clipped surrogate (arXiv 1707.06347
    eq. 7) with a higher upper bound (DAPO, arXiv 2503.14476 section 3.1)."""

    clip_low: float
    clip_high: float

    def ratios(self, log_ratios: Tensor, tokens: LossInputs) -> Tensor:
        """Return R of each token, [n], with gradient."""
        return exp_ratios(log_ratios)

    def __call__(self, log_ratios: Tensor, tokens: LossInputs) -> TokenLosses:
        ratios = self.ratios(log_ratios, tokens)
        unclipped = ratios * tokens.coefficients
        clipped = ratios.clamp(1 - self.clip_low, 1 + self.clip_high) * tokens.coefficients
        surrogate = torch.minimum(unclipped, clipped)
        return TokenLosses(-surrogate, surrogate < unclipped)


@dataclass(frozen=True)
class Gspo(PpoClip):
    """PpoClip with one ratio R per sequence: exp(mean_t log-ratio_t) over its trainable tokens (GSPO, arXiv 2507.18071
    section 4). Clips are far narrower than PPO's: the mean of many log-ratios is closer to 0 than each of them. Every
    token of a sequence has that sequence's loss, and the gradient of the mean reaches all of them: averaged by
    `SequenceMean` it is the paper's mean over sequences."""

    def ratios(self, log_ratios: Tensor, tokens: LossInputs) -> Tensor:
        return exp_ratios(tokens.means_by_sequence(log_ratios))[tokens.sequence_ids]


@dataclass(frozen=True)
class Cispo(PpoClip):
    """-sg[clip(R, 1 - clip_low, 1 + clip_high)] A log pi (CISPO, MiniMax-M1, arXiv 2506.13585 section 3.1): tokens that
    PPO's clip would drop keep a gradient with a bounded weight. The paper bounds R from above only: clip_low = 1."""

    def __call__(self, log_ratios: Tensor, tokens: LossInputs) -> TokenLosses:
        ratios = self.ratios(log_ratios, tokens).detach()
        bounded = ratios.clamp(1 - self.clip_low, 1 + self.clip_high)
        clipped = (bounded != ratios) & (tokens.coefficients != 0)
        return TokenLosses(-bounded * tokens.coefficients * tokens.logprobs, clipped)


@dataclass(frozen=True)
class Nft:
    """Negative-aware fine-tuning (arXiv 2505.18116). With pass rate r of the prompt, w = sqrt((1 - r) / r), floor > 0:

        correct  -w log R
        wrong    -w log max((1 - r R) / (1 - r), floor)

    where the maximum has the gradient of its first argument (straight-through): the old policy is the mixture r pi+ +
    (1 - r) pi- of a correct and a wrong one, and pi+ learns from both. At R = 1 the gradient is GRPO's with the
    population's standard deviation. `tokens.coefficients` must be those of `group_advantages(..., "nft")`, in (-1, 1):
    r if correct, -r if wrong, 0 if all or none of the group were correct."""

    floor: float = 1.0

    def __call__(self, log_ratios: Tensor, tokens: LossInputs) -> TokenLosses:
        has_signal = tokens.coefficients != 0
        rates = torch.where(has_signal, tokens.coefficients.abs(), 0.5)
        weights = ((1 - rates) / rates).sqrt() * has_signal
        negatives = (1 - rates * exp_ratios(log_ratios)) / (1 - rates)
        floored = negatives.detach().clamp(min=self.floor)
        is_wrong = tokens.coefficients < 0
        # The difference is exactly 0 and has the gradient of `negatives`.
        straight_through = floored + (negatives - negatives.detach())
        likelihoods = torch.where(is_wrong, straight_through.log(), log_ratios)
        return TokenLosses(-weights * likelihoods, is_wrong & (negatives < self.floor))


@dataclass(frozen=True)
class RatioInLoss:
    """pi_old is the engine's policy, by the engine's log-probs: the engine/trainer mismatch is part of the loss's
    ratio, and corrected within the loss's clips."""

    def log_ratios(self, tokens: LossInputs) -> Tensor:
        """Return log(pi / pi_old) of each token, [n], with gradient."""
        return tokens.logprobs - tokens.sampled_logprobs

    def weights(self, tokens: LossInputs) -> Tensor:
        """Return the detached factor of each token's loss, [n]."""
        return torch.ones_like(tokens.sampled_logprobs)

    def metric_sums(self, tokens: LossInputs) -> dict[str, Tensor]:
        """Return additive statistics of the correction."""
        return {}


@dataclass(frozen=True)
class TruncatedIS(RatioInLoss):
    """Truncated importance sampling (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training", 2025): each token's loss times w = sg[min(pi / pi_engine, cap)].

    pi_old is the model as it enters the step: each batch is used for one optimizer step, so the loss's ratio is always
    1 and only its gradient matters. The loss's clips are inactive; the cap bounds the weight of off-policy tokens.
    Metric sums: w and w^2 (effective sample size: (sum w)^2 / sum w^2 / T), and the number of tokens at the cap."""

    cap: float

    def log_ratios(self, tokens: LossInputs) -> Tensor:
        return tokens.logprobs - tokens.logprobs.detach()

    def weights(self, tokens: LossInputs) -> Tensor:
        return exp_ratios(tokens.log_ratios()).clamp(max=self.cap)

    def metric_sums(self, tokens: LossInputs) -> dict[str, Tensor]:
        weights = self.weights(tokens).double()
        truncated = exp_ratios(tokens.log_ratios()) > self.cap
        return {"weight": weights.sum(), "weight_squared": weights.square().sum(), "truncated": truncated.sum()}


@dataclass(frozen=True)
class TokenMean:
    """1/T sum_t: all tokens of the step count alike (DAPO, arXiv 2503.14476 section 3.3)."""

    def scales(self, tokens: LossInputs) -> Tensor:
        """Return the factor of each token's loss before the learner divides by T, [n]."""
        return torch.ones_like(tokens.sampled_logprobs)


@dataclass(frozen=True)
class SequenceMean(TokenMean):
    """1/N sum_s 1/|s| sum_{t in s}: each of the N sequences counts alike, whatever its length (GRPO, arXiv 2402.03300
    eq. 3). The factor is T / (N |s|) for each token of s."""

    def scales(self, tokens: LossInputs) -> Tensor:
        return tokens.num_tokens_global / (tokens.num_sequences_global * tokens.lengths()[tokens.sequence_ids])


@dataclass(frozen=True)
class ConstantLength(TokenMean):
    """1/(N length) sum_t: a token's weight does not depend on the lengths in the step (Dr. GRPO, arXiv 2503.20783
    section 3.2). `length` is in tokens, usually the maximum response length. The factor is T / (N length)."""

    length: int

    def scales(self, tokens: LossInputs) -> Tensor:
        scale = tokens.num_tokens_global / (tokens.num_sequences_global * self.length)
        return torch.full_like(tokens.sampled_logprobs, scale)


@dataclass(frozen=True)
class KlToReference:
    """coefficient (e^d - d - 1), d = log pi_ref - log pi: the estimate "k3" of KL(pi || pi_ref) from tokens that pi
    sampled, at least 0 for each (arXiv 2402.03300 eq. 4). Its gradient by log pi is coefficient (1 - e^d). The
    correction's weight does not apply to it. d is clamped to at most 20, without gradient beyond."""

    coefficient: float

    def divergences(self, tokens: LossInputs) -> Tensor:
        """Return e^d - d - 1 of each token in nats, float32 [n], with gradient; ValueError without reference."""
        if tokens.reference_logprobs is None:
            raise ValueError("reference_logprobs: expected a tensor for the KL penalty, got None")
        gaps = (tokens.reference_logprobs - tokens.logprobs).clamp(max=MAX_LOG_RATIO)
        return gaps.expm1() - gaps


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """The objective of an RL step. Metric sums, over tokens: those of `mismatch_sums` and of the correction; `clipped`,
    the number of tokens changed by a bound of the loss; with a KL penalty `reference_kl`, e^d - d - 1."""

    loss: PpoClip | Nft
    correction: RatioInLoss
    aggregation: TokenMean
    penalty: KlToReference | None = None

    def __call__(self, tokens: LossInputs) -> LossOutputs:
        losses, clipped = self.loss(self.correction.log_ratios(tokens), tokens)
        losses = self.correction.weights(tokens) * losses
        sums = mismatch_sums(tokens) | self.correction.metric_sums(tokens)
        sums["clipped"] = clipped.sum()
        if self.penalty is not None:
            divergences = self.penalty.divergences(tokens)
            losses = losses + self.penalty.coefficient * divergences
            sums["reference_kl"] = divergences.detach().double().sum()
        return LossOutputs((self.aggregation.scales(tokens) * losses).sum(), sums)


def mismatch_sums(tokens: LossInputs) -> dict[str, Tensor]:
    """Return sums in float64 that compare the model in training with the policy that sampled: `entropy` in nats;
    `ratio` R = pi / pi_engine and `ratio_squared` (effective sample size: (sum R)^2 / sum R^2 / T); `mismatch`, |log R|
    in nats; `mismatch_kl`, R - 1 - log R, an estimate of KL(pi_engine || pi)."""
    log_ratios = tokens.log_ratios().double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratios = log_ratios.exp()
    return {
        "entropy": tokens.entropies.sum(),
        "ratio": ratios.sum(),
        "ratio_squared": ratios.square().sum(),
        "mismatch": log_ratios.abs().sum(),
        "mismatch_kl": (log_ratios.expm1() - log_ratios).sum(),
    }
