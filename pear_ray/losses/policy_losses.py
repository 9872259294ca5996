"""What RL minimizes for one token, before any correction or average.

Each loss maps the log-ratios of a micro-batch's trainable tokens, float32 [n] with gradient, to one
loss for each. The ratio is that of the model in training to the policy that the loss calls old;
which that is, the correction says (`policy_gradients`). A is the advantage, `tokens.coefficients`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pear_ray.losses.inputs import LossInputs


class Terms(NamedTuple):
    """`losses` float32 [n] with gradient, and `clipped` bool [n]: whose loss a bound changed."""

    losses: Tensor
    clipped: Tensor


# Far outside every clip; beyond e^88 float32 would give inf, and inf x 0 is NaN.
MAX_LOG_RATIO = 20.0


def ratios_of(log_ratios: Tensor) -> Tensor:
    """e^x, where x beyond -20 and 20 is held there and has no gradient."""
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@dataclass(frozen=True)
class PpoClip:
    """-min(R A, clip(R, 1 - clip_low, 1 + clip_high) A), R the token's ratio: PPO's clipped
    surrogate (arXiv 1707.06347 eq. 7) with a higher upper bound (DAPO, arXiv 2503.14476
    section 3.1)."""

    clip_low: float
    clip_high: float

    def ratios(self, log_ratios: Tensor, tokens: LossInputs) -> Tensor:
        """R of each token, [n], with gradient."""
        return ratios_of(log_ratios)

    def __call__(self, log_ratios: Tensor, tokens: LossInputs) -> Terms:
        ratios = self.ratios(log_ratios, tokens)
        bounded = ratios.clamp(1 - self.clip_low, 1 + self.clip_high)
        plain = ratios * tokens.coefficients
        surrogate = torch.minimum(plain, bounded * tokens.coefficients)
        return Terms(-surrogate, surrogate < plain)


@dataclass(frozen=True)
class Gspo(PpoClip):
    """The same, R one ratio for a whole sequence: exp(mean_t log-ratio_t) over its trainable
    tokens (GSPO, arXiv 2507.18071 section 4). Clips are far narrower than PPO's: the mean of many
    log-ratios is closer to 0 than each of them.

    Every token of a sequence has that sequence's loss, and the gradient of the mean goes through
    all of them: averaged by `SequenceMean` it is the paper's mean over sequences.
    """

    def ratios(self, log_ratios: Tensor, tokens: LossInputs) -> Tensor:
        return ratios_of(tokens.means_by_sequence(log_ratios))[tokens.sequence_ids]


@dataclass(frozen=True)
class Cispo(PpoClip):
    """-sg[clip(R, 1 - clip_low, 1 + clip_high)] A log pi (CISPO, MiniMax-M1, arXiv 2506.13585
    section 3.1): where PPO's clip takes the gradient of a token away, here it bounds its weight.
    The paper bounds the ratio from above only: clip_low = 1."""

    def __call__(self, log_ratios: Tensor, tokens: LossInputs) -> Terms:
        ratios = self.ratios(log_ratios, tokens).detach()
        bounded = ratios.clamp(1 - self.clip_low, 1 + self.clip_high)
        clipped = (bounded != ratios) & (tokens.coefficients != 0)
        return Terms(-bounded * tokens.coefficients * tokens.logprobs, clipped)


@dataclass(frozen=True)
class Nft:
    """Negative-aware fine-tuning (arXiv 2505.18116). With r the share of right answers to the
    prompt, w = sqrt((1 - r) / r) and floor > 0,

        right  -w log R
        wrong  -w log max((1 - r R) / (1 - r), floor)

    where the maximum has the gradient of its first argument (straight-through): the old policy is
    the mixture r pi+ + (1 - r) pi- of a right and a wrong one, and pi+ is learned from both. At
    R = 1 the gradient is that of GRPO with the population's standard deviation.

    `tokens.coefficients` are those of `group_advantages(..., "nft")`, within (-1, 1): r for a
    right answer, -r for a wrong one, 0 where all or none were right. Any others are no r.
    """

    floor: float = 1.0

    def __call__(self, log_ratios: Tensor, tokens: LossInputs) -> Terms:
        signal = tokens.coefficients != 0
        rates = torch.where(signal, tokens.coefficients.abs(), 0.5)
        weights = ((1 - rates) / rates).sqrt() * signal
        others = (1 - rates * ratios_of(log_ratios)) / (1 - rates)
        held = others.detach().clamp(min=self.floor)
        wrong = tokens.coefficients < 0
        # The difference is exactly 0 and has the gradient of `others`.
        likelihoods = torch.where(wrong, (held + (others - others.detach())).log(), log_ratios)
        return Terms(-weights * likelihoods, wrong & (others < self.floor))


PolicyLoss = PpoClip | Gspo | Cispo | Nft
