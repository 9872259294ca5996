"""Objectives of `cooperate`: one loss for a step on rollouts and demonstrations. One objective for each of the two sees
its own tokens only, as a step of its own; the classes here combine the two sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pear_ray.losses import LossInputs, LossOutputs, Objective
from pear_ray.losses.policy import PolicyGradient
from pear_ray.losses.sft import Supervised, TokenLoss

# Of the metric sums of demonstrations; those of rollouts have none.
DEMONSTRATION_PREFIX = "sft_"


@dataclass(frozen=True)
class JointTokenMean(Objective):
    """(sum over rollout tokens + sum over demonstration tokens) / their number: TRAPO's one loss for completions that
    continue an expert's prefix (arXiv 2512.17636). Weighting both kinds of tokens alike is this project's reading.
    Without demonstrations it is the rollouts' objective. Metric sums are those of both objectives, the demonstrations'
    with `DEMONSTRATION_PREFIX`, and the losses `rl_loss` and `sft_loss`."""

    rollouts: PolicyGradient
    demonstrations: Supervised

    @property
    def top_k(self) -> int:  # type: ignore[override]
        return self.demonstrations.top_k

    def __call__(self, tokens: LossInputs) -> LossOutputs:
        rl = self.rollouts(tokens.rollouts_only())
        sft = self.demonstrations(tokens.demonstrations_only())
        sums = {DEMONSTRATION_PREFIX + name: value for name, value in sft.metric_sums.items()} | rl.metric_sums
        sums |= {"rl_loss": rl.loss.detach(), DEMONSTRATION_PREFIX + "loss": sft.loss.detach()}
        return LossOutputs(self.combine(rl.loss, sft.loss, tokens), sums)

    def combine(self, rl_loss: Tensor, sft_loss: Tensor, tokens: LossInputs) -> Tensor:
        """Return one sum, which the learner divides by the number of all tokens."""
        return rl_loss + sft_loss


@dataclass(frozen=True)
class LambdaMix(JointTokenMean):
    """rl_weight mean over rollout tokens + (1 - rl_weight) mean over demonstration tokens: the naive sum, and the
    student's part of BRIDGE (arXiv 2509.06948), where rl_weight is lambda."""

    rl_weight: float

    def combine(self, rl_loss: Tensor, sft_loss: Tensor, tokens: LossInputs) -> Tensor:
        # Exactly 1 for the only kind, if a step has just one.
        rl_scale = tokens.num_tokens_global * self.rl_weight / max(1, tokens.num_rollout_tokens_global)
        sft_scale = tokens.num_tokens_global * (1 - self.rl_weight) / max(1, tokens.num_demonstration_tokens_global)
        return rl_scale * rl_loss + sft_scale * sft_loss


@dataclass(frozen=True)
class HighEntropyOnly(TokenLoss):
    """`loss` on the `share` of each demonstration's tokens with the highest entropy under the model, rounded up, and 0
    on the others: MIFO's high-entropy tokens (arXiv 2510.04454). Taking the share per demonstration, and counting
    masked tokens in the mean, are this project's choices; the authors' are not public."""

    loss: TokenLoss
    share: float

    @property
    def top_k(self) -> int:  # type: ignore[override]
        return self.loss.top_k

    def __call__(self, tokens: LossInputs) -> Tensor:
        ids, lengths = tokens.sequence_ids, tokens.lengths()
        # Both sorts are stable: ties go to the earlier token.
        by_entropy = torch.argsort(tokens.entropies, descending=True, stable=True)
        order = by_entropy[torch.argsort(ids[by_entropy], stable=True)]
        before = lengths.cumsum(0) - lengths
        entropy_rank = torch.arange(ids.numel(), device=ids.device) - before[ids[order]]
        is_chosen = torch.zeros_like(ids, dtype=torch.bool)
        is_chosen[order] = entropy_rank < (lengths[ids[order]] * self.share).ceil()
        return self.loss(tokens) * is_chosen


def rl_weight_at(step: int, num_steps: int, first: float, last: float) -> float:
    """Return the weight of the rollouts at a step, linear from the first step's to the last's."""
    return first if num_steps < 2 else first + (last - first) * step / (num_steps - 1)
