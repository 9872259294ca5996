"""What is minimized where one step learns from rollouts and from offline traces.

An objective for each kind of tokens sees its own kind alone, in a step of its own; what is
different here is how their sums become one loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pear_ray.losses.inputs import LossInputs, LossOutputs
from pear_ray.losses.policy import PolicyGradient
from pear_ray.losses.sft import Supervised
from pear_ray.losses.token_losses import TokenLoss

# Begins the names of facts about traces; those about rollouts keep theirs.
OF_TRACES = "trace_"


@dataclass(frozen=True)
class JointTokenMean:
    """(sum over rollout tokens + sum over trace tokens) / their number: TRAPO's one loss for
    answers that an expert began and the policy went on with (arXiv 2512.17636). That the two sums
    count alike for each token is this project's reading. Without traces it is the objective of
    the rollouts alone.

    Facts are those of both objectives, the traces' with `OF_TRACES` before their names; and the
    losses of both, `rl_loss` and `sft_loss`, as sums.
    """

    rollouts: PolicyGradient
    traces: Supervised

    @property
    def top_k(self) -> int:
        return self.traces.top_k

    def __call__(self, tokens: LossInputs) -> LossOutputs:
        ours, theirs = self.rollouts(tokens.of_rollouts()), self.traces(tokens.of_traces())
        facts = {OF_TRACES + name: fact for name, fact in theirs.facts.items()}
        facts |= ours.facts | {
            "rl_loss": ours.loss.detach(),
            OF_TRACES + "loss": theirs.loss.detach(),
        }
        return LossOutputs(self.joined(ours.loss, theirs.loss, tokens), facts)

    def joined(self, rollouts: Tensor, traces: Tensor, tokens: LossInputs) -> Tensor:
        """One sum, which the learner divides by the number of all tokens."""
        return rollouts + traces

    def factor(self, facts: Mapping[str, np.ndarray], num_tokens: int) -> float:
        """The step's gradient is taken as it is."""
        return 1.0


@dataclass(frozen=True)
class LambdaMix(JointTokenMean):
    """rl_weight mean over rollout tokens + (1 - rl_weight) mean over trace tokens: the naive
    sum, and the student's part of BRIDGE (arXiv 2509.06948), where rl_weight is lambda."""

    rl_weight: float

    def joined(self, rollouts: Tensor, traces: Tensor, tokens: LossInputs) -> Tensor:
        # Exactly 1 for the one where there is nothing of the other.
        num_tokens = tokens.num_tokens_global
        of_rollouts = num_tokens * self.rl_weight / max(1, tokens.num_rollout_tokens_global)
        of_traces = num_tokens * (1 - self.rl_weight) / max(1, tokens.num_trace_tokens_global)
        return of_rollouts * rollouts + of_traces * traces


@dataclass(frozen=True)
class HighEntropyOnly(TokenLoss):
    """Another loss on the `share` of each trace's tokens at which the model's entropy is highest,
    rounded up, and 0 on the others: MIFO's high-entropy tokens (arXiv 2510.04454). That the share
    is taken of each trace, and that tokens left out still count in the mean, is this project's
    choice; the authors' is not public."""

    loss: TokenLoss
    share: float

    @property
    def top_k(self) -> int:  # type: ignore[override]
        return self.loss.top_k

    def __call__(self, tokens: LossInputs) -> Tensor:
        return self.loss(tokens) * self.chosen(tokens)

    def chosen(self, tokens: LossInputs) -> Tensor:
        """Which tokens are learned, bool [n]; of equal ones the earlier."""
        ids = tokens.sequence_ids
        by_entropy = torch.argsort(tokens.entropies, descending=True, stable=True)
        order = by_entropy[torch.argsort(ids[by_entropy], stable=True)]
        lengths = tokens.lengths()
        before = lengths.cumsum(0) - lengths
        place = torch.arange(ids.numel(), device=ids.device) - before[ids[order]]
        is_chosen = torch.zeros_like(ids, dtype=torch.bool)
        is_chosen[order] = place < (lengths[ids[order]] * self.share).ceil()
        return is_chosen


def rl_weight_at(step: int, num_steps: int, first: float, last: float) -> float:
    """Share of the rollouts in a step, on a straight line from the first step's to the last's."""
    if num_steps < 2:
        return first
    return first + (last - first) * step / (num_steps - 1)
