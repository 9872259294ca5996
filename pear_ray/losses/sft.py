"""SFT objectives: a loss per token, float32 [n], in nats or in units of them, and its weighted sum over a micro-batch.
p is the probability that the model in training gives the data's token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pear_ray.losses import LossInputs, LossOutputs, Objective
from pear_ray.losses.pear import NoNormalization, Pear
from pear_ray.statistics import NUM_BINS, NUM_POSITIONS


class TokenLoss(ABC):
    """A base loss. `top_k` is as for `Objective`."""

    top_k = 0

    @abstractmethod
    def __call__(self, tokens: LossInputs) -> Tensor:
        """Return the loss of each token, [n]."""


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
    """-sg[min(1, p / alpha)] log p: the gradient's factor 1/p becomes 1 / max(p, alpha) (TRAPO, arXiv 2512.17636)."""

    alpha: float = 0.1

    def __call__(self, tokens: LossInputs) -> Tensor:
        return -(tokens.logprobs.detach().exp() / self.alpha).clamp(max=1.0) * tokens.logprobs


@dataclass(frozen=True)
class SedSft(TokenLoss):
    """-log p + strength * M (p - 1/2)^2, where M = 1 if the probability of the model's `top_k` likeliest tokens is
    below `top_mass`, else 0 (SED-SFT, arXiv 2602.07464): preserves exploration where the model is undecided."""

    strength: float = 1.0
    top_k: int = 10
    top_mass: float = 0.95

    def __call__(self, tokens: LossInputs) -> Tensor:
        assert tokens.top_masses is not None
        is_undecided = tokens.top_masses < self.top_mass
        return -tokens.logprobs + self.strength * is_undecided * (tokens.logprobs.exp() - 0.5) ** 2


@dataclass(frozen=True)
class IwSft(TokenLoss):
    """-w log p with one detached weight per sequence, w = clip(exp(temperature * mean_t[log pi_theta - log pi_ref]),
    bounds) (iw-SFT, arXiv 2507.12856, with the bounds of its authors' trainer). The authors' reference is the frozen
    initial model. Here it is the model that scored the corpus: the behavior policy, or the initial model if the job
    scores with it."""

    temperature: float = 1.0
    bounds: tuple[float, float] = (0.0, 16.0)

    def __call__(self, tokens: LossInputs) -> Tensor:
        weights = (self.temperature * tokens.means_by_sequence(tokens.log_ratios())).exp().clamp(*self.bounds)
        return -weights[tokens.sequence_ids] * tokens.logprobs


@dataclass(frozen=True)
class Kl(TokenLoss):
    """KL(pi_beta || pi_theta) over the behavior policy's stored likeliest tokens and one bucket for all others: with k
    stored tokens S and remainders r = 1 - sum_S pi,

        sum_S pi_beta (log pi_beta - log pi_theta) + r_beta (log r_beta - log r_theta)

    (PEAR's other base loss, arXiv 2602.01058 section 3.2; the direction is this project's choice). The bucket makes it
    a lower bound of the full divergence, which it is if the whole vocabulary is stored: then there is no bucket."""

    vocab_size: int

    def __call__(self, tokens: LossInputs) -> Tensor:
        teacher, model = tokens.teacher_logprobs, tokens.logprobs_of_teacher
        assert teacher is not None and model is not None
        teacher = teacher.clamp(min=-1e4)  # 0 times minus infinity would be NaN.
        loss = (teacher.exp() * (teacher - model)).sum(-1)
        if teacher.shape[-1] >= self.vocab_size:
            return loss
        teacher_rest, model_rest = log_complement(teacher.logsumexp(-1)), log_complement(model.logsumexp(-1))
        return loss + teacher_rest.exp() * (teacher_rest - model_rest)


@dataclass(frozen=True)
class Unlikelihood(TokenLoss):
    """-log(1 - p), capped at `cap` nats per token: for wrong responses. An extension of this project (the paper's
    treatment of negative responses is not public)."""

    cap: float = 5.0

    def __call__(self, tokens: LossInputs) -> Tensor:
        return -log_complement(tokens.logprobs).clamp(min=-self.cap)


def log_complement(logprobs: Tensor) -> Tensor:
    """Return log(1 - e^x) for x <= 0, without cancellation."""
    # Beyond, float32 holds no gradient of 1 - e^x; such a token counts as certain.
    x = logprobs.clamp(max=-1e-6)
    return torch.where(x > -0.6931, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


@dataclass(frozen=True)
class Supervised(Objective):
    """Plain SFT with any base loss: each token's loss times the size of its coefficient. Tokens with a negative
    coefficient belong to wrong responses: `Unlikelihood` replaces the loss."""

    loss: TokenLoss = field(default_factory=Nll)

    @property
    def top_k(self) -> int:  # type: ignore[override]
        return self.loss.top_k

    def __call__(self, tokens: LossInputs) -> LossOutputs:
        return LossOutputs((tokens.coefficients.abs() * self.token_losses(tokens)).sum(), nll_sums(tokens))

    def token_losses(self, tokens: LossInputs) -> Tensor:
        """Return the loss of each token before weights and coefficients, [n]."""
        return torch.where(tokens.coefficients < 0, Unlikelihood()(tokens), self.loss(tokens))


@dataclass(frozen=True)
class Weighted(Supervised):
    """PEAR-SFT: `Supervised` with a detached importance weight for each token (arXiv 2602.01058, section 3.2)."""

    weigh: Pear = field(kw_only=True)
    normalization: NoNormalization = field(default_factory=NoNormalization)
    sources: tuple[str, ...] = ()

    def __call__(self, tokens: LossInputs) -> LossOutputs:
        raw = self.weigh(tokens)
        weights = self.normalization.apply(raw, tokens)
        loss = (weights * tokens.coefficients.abs() * self.token_losses(tokens)).sum()
        return LossOutputs(loss, nll_sums(tokens) | self.weight_sums(raw, tokens))

    def grad_scale(self, metric_sums: Mapping[str, np.ndarray], num_tokens: int) -> float:
        return self.normalization.grad_scale(float(metric_sums["weight"]) / num_tokens)

    def weight_sums(self, weights: Tensor, tokens: LossInputs) -> dict[str, Tensor]:
        """Return additive statistics of the weights, for `statistics.weight_summary`."""
        log_ratios = self.weigh.prepared(tokens).log_ratios().double()
        (low, high), (floor, ceiling) = self.weigh.clip_log_ratio, self.weigh.clip_log_weight
        weights = weights.double()
        log_weights = weights.log()
        scaled = (log_weights - floor) / (ceiling - floor) * NUM_BINS
        relative, is_first = tokens.relative_positions()
        position_bins = (relative * NUM_POSITIONS).long().clamp(max=NUM_POSITIONS - 1)
        sums = {
            "weight": weights.sum(),
            "weight_squared": weights.square().sum(),
            "log_ratio": log_ratios.sum(),
            "log_ratio_squared": log_ratios.square().sum(),
            "clip_frac_low": (log_ratios <= low).sum(),
            "clip_frac_high": (log_ratios >= high).sum(),
            "weight_frac_at_floor": (log_weights <= floor + 1e-6).sum(),
            "weight_frac_at_ceiling": (log_weights >= ceiling - 1e-6).sum(),
            "weight_histogram": histogram(scaled.long().clamp(0, NUM_BINS - 1), NUM_BINS),
            "weight_by_position": histogram(position_bins, NUM_POSITIONS, weights),
            "tokens_by_position": histogram(position_bins, NUM_POSITIONS),
        }
        of_source = torch.tensor([[o == source for o in tokens.origins] for source in self.sources], dtype=torch.bool)
        for source, mask in zip(self.sources, of_source.to(weights.device), strict=True):
            own = mask[tokens.sequence_ids]
            starts = is_first & own
            sums[f"first_weight/{source}"] = (weights * starts).sum()
            sums[f"sequences/{source}"] = starts.sum()
            sums[f"clipped_low/{source}"] = ((log_ratios <= low) & own).sum()
            sums[f"tokens/{source}"] = own.sum()
        return sums


def nll_sums(tokens: LossInputs) -> dict[str, Tensor]:
    """Return the metric sums of every SFT objective: `nll` over tokens with a positive coefficient, whatever is
    minimized, their number `tokens_to_learn`, and `entropy` over all tokens."""
    to_learn = tokens.coefficients > 0
    nll = -(tokens.logprobs.detach() * to_learn).sum()
    return {"nll": nll, "tokens_to_learn": to_learn.sum(), "entropy": tokens.entropies.sum()}


@dataclass(frozen=True)
class TopMasses(Objective):
    """Measures without a gradient: a histogram of the probability of the `top_k` likeliest tokens."""

    top_k: int
    num_bins: int = 1000

    def __call__(self, tokens: LossInputs) -> LossOutputs:
        assert tokens.top_masses is not None
        bins = (tokens.top_masses * self.num_bins).long().clamp(0, self.num_bins - 1)
        return LossOutputs(tokens.logprobs.sum() * 0, {"histogram": histogram(bins, self.num_bins)})


def histogram(bins: Tensor, num_bins: int, weights: Tensor | None = None) -> Tensor:
    """Return the sum of `weights` (or the count) per bin, float64 [num_bins]."""
    values = torch.ones_like(bins, dtype=torch.float64) if weights is None else weights.double()
    return torch.zeros(num_bins, dtype=torch.float64, device=bins.device).index_add(0, bins, values)
