"""What SFT minimizes. Each objective maps one micro-batch to SUMS over its tokens; the
learner divides once by the global token count, so no split of the batch changes the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pear_ray.losses.inputs import LossInputs, LossOutputs
from pear_ray.losses.token_losses import Nll, TokenLoss, Unlikelihood
from pear_ray.losses.weighting import NoNormalization, Normalization, Pear
from pear_ray.statistics import NUM_BINS, NUM_POSITIONS


@dataclass(frozen=True)
class Supervised:
    """Plain SFT with any base objective: the loss of every token times its coefficient.

    Tokens with a negative coefficient belong to traces that are known to be wrong; they are pushed
    down (`losses.Unlikelihood`) rather than learned.
    """

    loss: TokenLoss = field(default_factory=Nll)

    def __call__(self, tokens: LossInputs) -> LossOutputs:
        return LossOutputs(
            (tokens.coefficients.abs() * self.losses(tokens)).sum(), supervised(tokens)
        )

    @property
    def top_k(self) -> int:
        return self.loss.top_k

    def losses(self, tokens: LossInputs) -> Tensor:
        """Loss of each token, [n], before weights and coefficients."""
        wrong = tokens.coefficients < 0
        return torch.where(wrong, Unlikelihood()(tokens), self.loss(tokens))

    def factor(self, facts: Mapping[str, np.ndarray], num_tokens: int) -> float:
        """What the step's gradient is multiplied by, given the facts summed over all of it."""
        return 1.0


@dataclass(frozen=True)
class Weighted(Supervised):
    """PEAR-SFT: the same, each token times its detached importance weight
    (arXiv 2602.01058, section 3.2)."""

    weigh: Pear = field(kw_only=True)
    normalization: Normalization = field(default_factory=NoNormalization)
    sources: tuple[str, ...] = ()

    def __call__(self, tokens: LossInputs) -> LossOutputs:
        weights = self.weigh(tokens)
        applied = self.normalization.applied(weights, tokens)
        loss = (applied * tokens.coefficients.abs() * self.losses(tokens)).sum()
        return LossOutputs(loss, supervised(tokens) | self.facts(weights, tokens))

    def factor(self, facts: Mapping[str, np.ndarray], num_tokens: int) -> float:
        return self.normalization.factor(float(facts["weight"]) / num_tokens)

    def facts(self, weights: Tensor, tokens: LossInputs) -> dict[str, Tensor]:
        """Additive statistics of the weights; `statistics.weight_summary` reads them."""
        ratios = self.weigh.ratios(tokens).double()
        low, high = self.weigh.clip_log_ratio
        floor, ceiling = self.weigh.clip_log_weight
        weights = weights.double()
        log_weights = weights.log()
        scaled = (log_weights - floor) / (ceiling - floor) * NUM_BINS
        relative, is_first = tokens.relative_positions()
        position_bin = (relative * NUM_POSITIONS).long().clamp(max=NUM_POSITIONS - 1)
        facts = {
            "weight": weights.sum(),
            "weight_squared": weights.square().sum(),
            "log_ratio": ratios.sum(),
            "log_ratio_squared": ratios.square().sum(),
            "clip_frac_low": (ratios <= low).sum(),
            "clip_frac_high": (ratios >= high).sum(),
            "weight_frac_at_floor": (log_weights <= floor + 1e-6).sum(),
            "weight_frac_at_ceiling": (log_weights >= ceiling - 1e-6).sum(),
            "weight_histogram": histogram(scaled.long().clamp(0, NUM_BINS - 1), NUM_BINS),
            "weight_by_position": histogram(position_bin, NUM_POSITIONS, weights),
            "tokens_by_position": histogram(position_bin, NUM_POSITIONS),
        }
        names = {source: number for number, source in enumerate(self.sources)}
        owners = torch.tensor([names.get(o, -1) for o in tokens.origins], device=weights.device)
        owner = owners[tokens.sequence_ids]
        for number, source in enumerate(self.sources):
            starts = is_first & (owner == number)
            facts[f"first_weight/{source}"] = (weights * starts).sum()
            facts[f"sequences/{source}"] = starts.sum()
        return facts


def supervised(tokens: LossInputs) -> dict[str, Tensor]:
    """Facts of every SFT: the log-likelihood of the traces to be learned, whatever is minimized,
    and the entropy at all places."""
    right = tokens.coefficients > 0
    return {
        "nll": -(tokens.logprobs.detach() * right).sum(),
        "tokens_to_learn": right.sum(),
        "entropy": tokens.entropies.sum(),
    }


@dataclass(frozen=True)
class TopMasses:
    """Minimizes nothing: how the probability of the `top_k` likeliest tokens is spread."""

    top_k: int
    num_bins: int = 1000

    def __call__(self, tokens: LossInputs) -> LossOutputs:
        assert tokens.top_masses is not None
        bins = (tokens.top_masses * self.num_bins).long().clamp(0, self.num_bins - 1)
        return LossOutputs(tokens.logprobs.sum() * 0, {"histogram": histogram(bins, self.num_bins)})

    def factor(self, facts: Mapping[str, np.ndarray], num_tokens: int) -> float:
        """There is no gradient."""
        return 1.0


def histogram(bins: Tensor, num_bins: int, weights: Tensor | None = None) -> Tensor:
    """Sum of `weights` (or count) per bin, float64 [num_bins]."""
    values = torch.ones_like(bins, dtype=torch.float64) if weights is None else weights.double()
    return torch.zeros(num_bins, dtype=torch.float64, device=bins.device).index_add(0, bins, values)
