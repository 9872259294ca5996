"""What SFT minimizes for one token, before any weight: the base objectives.

Each maps the trainable tokens of a micro-batch to one loss per token, float32 [n], in nats or in
units of them. p is the probability that the model in training gives the token of the data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pear_ray.losses.inputs import LossInputs


class TokenLoss(ABC):
    """A base objective. `top_k` is how many likeliest tokens `tokens.top_masses` must count."""

    top_k = 0

    @abstractmethod
    def __call__(self, tokens: LossInputs) -> Tensor:
        """Loss of each token, [n]."""


@dataclass(frozen=True)
class Nll(TokenLoss):
    """-log p."""

    def __call__(self, tokens: LossInputs) -> Tensor:
        return -tokens.logprobs


@dataclass(frozen=True)
class Dft(TokenLoss):
    """-sg[p] log p: the gradient of p itself (Dynamic Fine-Tuning, arXiv 2508.05629)."""

    def __call__(self, tokens: LossInputs) -> Tensor:
        return -tokens.logprobs.detach().exp() * tokens.logprobs


@dataclass(frozen=True)
class TrSft(TokenLoss):
    """-sg[min(1, p / alpha)] log p: the factor 1/p of the gradient becomes 1 / max(p, alpha)
    (TRAPO, arXiv 2512.17636)."""

    alpha: float = 0.1

    def __call__(self, tokens: LossInputs) -> Tensor:
        trust = (tokens.logprobs.detach().exp() / self.alpha).clamp(max=1.0)
        return -trust * tokens.logprobs


@dataclass(frozen=True)
class SedSft(TokenLoss):
    """-log p + strength * M (p - 1/2)^2, where M = 1 if the probability of the model's `top_k`
    likeliest tokens is below `top_mass`, else 0 (SED-SFT, arXiv 2602.07464): exploration is kept
    alive only where the model is still undecided."""

    strength: float = 1.0
    top_k: int = 10
    top_mass: float = 0.95

    def __call__(self, tokens: LossInputs) -> Tensor:
        assert tokens.top_masses is not None
        undecided = tokens.top_masses < self.top_mass
        return -tokens.logprobs + self.strength * undecided * (tokens.logprobs.exp() - 0.5) ** 2


@dataclass(frozen=True)
class IwSft(TokenLoss):
    """-w log p with one detached weight for each sequence,
    w = clip(exp(temperature * mean_t[log pi_theta - log pi_ref]), bounds)
    (iw-SFT, arXiv 2507.12856, and the bounds of its authors' trainer).

    The authors' reference is the frozen start model. Here it is whatever scored the corpus: the
    behavior policy, or the start model where the job scored it under that one.
    """

    temperature: float = 1.0
    bounds: tuple[float, float] = (0.0, 16.0)

    def __call__(self, tokens: LossInputs) -> Tensor:
        ratios = tokens.logprobs.detach() - tokens.sampled_logprobs
        means = tokens.means_by_sequence(ratios)
        weights = (self.temperature * means).exp().clamp(*self.bounds)
        return -weights[tokens.sequence_ids] * tokens.logprobs


@dataclass(frozen=True)
class Kl(TokenLoss):
    """KL(pi_beta || pi_theta) over the behavior policy's stored likeliest tokens and one bucket
    for all others: with k stored tokens S and remainders r = 1 - sum_S pi,

        sum_S pi_beta (log pi_beta - log pi_theta) + r_beta (log r_beta - log r_theta)

    (PEAR's other base loss, arXiv 2602.01058 section 3.2; the direction is this project's choice).
    The bucket makes it a lower bound of the full divergence. With the whole vocabulary stored there
    is no bucket and it is the full divergence.
    """

    vocab_size: int

    def __call__(self, tokens: LossInputs) -> Tensor:
        theirs, ours = tokens.teacher_logprobs, tokens.logprobs_of_teacher
        assert theirs is not None and ours is not None
        # Nothing times minus infinity would be NaN.
        theirs = theirs.clamp(min=-1e4)
        loss = (theirs.exp() * (theirs - ours)).sum(-1)
        if theirs.shape[-1] >= self.vocab_size:
            return loss
        rest_theirs, rest_ours = log_remainder(theirs), log_remainder(ours)
        return loss + rest_theirs.exp() * (rest_theirs - rest_ours)


@dataclass(frozen=True)
class Unlikelihood(TokenLoss):
    """-log(1 - p), capped at `cap` nats per token: for traces known to be wrong. An extension of
    this project (the paper's own treatment of negative traces is not public)."""

    cap: float = 5.0

    def __call__(self, tokens: LossInputs) -> Tensor:
        return -log_complement(tokens.logprobs).clamp(min=-self.cap)


# 1 - e^x has no gradient that float32 can hold above this; beyond it a token is certain.
MAX_LOGPROB = -1e-6


def log_complement(logprobs: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, without the cancellation of writing it so."""
    x = logprobs.clamp(max=MAX_LOGPROB)
    return torch.where(x > -0.6931, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def log_remainder(logprobs: Tensor) -> Tensor:
    """Log of what the probabilities of the last dimension leave of 1."""
    return log_complement(logprobs.logsumexp(-1))
