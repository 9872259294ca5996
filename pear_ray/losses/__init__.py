"""Losses of SFT and RL. This file: the inputs and outputs that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """The n trainable tokens of one micro-batch, with the outputs of the model in training.

    float32 [n]: `logprobs` (with gradient); without gradient, `entropies`, `sampled_logprobs`, `coefficients`,
    `top_masses`, and, with a KL penalty, `reference_logprobs`, the reference policy's log-probs of the same tokens.
    int64 [n]: `sequence_ids`. One string per sequence, also those without trainable tokens: `origins`. For
    distillation, float32 [n, k]: `teacher_logprobs`, the behavior policy's log-probs of its k likeliest tokens, and
    `logprobs_of_teacher`, the model's own log-probs of the same tokens, with gradient. In a step on rollouts and
    demonstrations, bool [n]: `from_demonstration`.

    `*_global` count the whole step: trainable tokens; sequences with a trainable token outside demonstrations;
    trainable tokens of demonstrations, and sequences with one.
    """

    logprobs: Tensor
    entropies: Tensor
    sampled_logprobs: Tensor
    coefficients: Tensor
    sequence_ids: Tensor
    origins: tuple[str, ...]
    num_tokens_global: int
    num_sequences_global: int
    top_masses: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    logprobs_of_teacher: Tensor | None = None
    reference_logprobs: Tensor | None = None
    from_demonstration: Tensor | None = None
    num_demonstration_tokens_global: int = 0
    num_demonstration_sequences_global: int = 0

    @property
    def num_rollout_tokens_global(self) -> int:
        """Trainable tokens of the whole step that are not of demonstrations."""
        return self.num_tokens_global - self.num_demonstration_tokens_global

    def rollouts_only(self) -> LossInputs:
        """Return the tokens of rollouts as a step of their own."""
        mask = None if self.from_demonstration is None else ~self.from_demonstration
        return self._select(mask, self.num_rollout_tokens_global, self.num_sequences_global)

    def demonstrations_only(self) -> LossInputs:
        """Return the tokens of demonstrations as a step of their own."""
        mask = self.from_demonstration
        if mask is None:
            mask = torch.zeros_like(self.sequence_ids, dtype=torch.bool)
        return self._select(mask, self.num_demonstration_tokens_global, self.num_demonstration_sequences_global)

    def _select(self, mask: Tensor | None, num_tokens: int, num_sequences: int) -> LossInputs:
        values = vars(self) | {"num_tokens_global": num_tokens, "num_sequences_global": num_sequences}
        if mask is not None:
            values |= {name: value[mask] for name, value in values.items() if isinstance(value, Tensor)}
        return LossInputs(**values)

    def log_ratios(self) -> Tensor:
        """Return log(pi / pi_sampled) of each token, [n], detached."""
        return self.logprobs.detach() - self.sampled_logprobs

    def sums_by_sequence(self, values: Tensor) -> Tensor:
        """Return the sum of `values` [n] over each sequence's tokens, [sequences]."""
        return values.new_zeros(len(self.origins)).index_add(0, self.sequence_ids, values)

    def lengths(self) -> Tensor:
        """Return the number of trainable tokens of each sequence, int64 [sequences]."""
        return self.sums_by_sequence(torch.ones_like(self.sequence_ids))

    def means_by_sequence(self, values: Tensor) -> Tensor:
        """Return the mean of `values` [n] over each sequence's tokens, [sequences]; 0 if none."""
        return self.sums_by_sequence(values) / self.lengths().clamp(min=1)

    def relative_positions(self) -> tuple[Tensor, Tensor]:
        """Return each token's position in its sequence, in [0, 1), and whether it is the first."""
        index, first, _ = sequence_bounds(self.sequence_ids)
        return (index - first) / self.lengths()[self.sequence_ids], index == first


def sequence_bounds(sequence_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the index of each token, and those of the first and the last token of its sequence, int64 [n]."""
    index = torch.arange(sequence_ids.numel(), device=sequence_ids.device)
    edge = sequence_ids[1:] != sequence_ids[:-1]
    end = torch.ones_like(sequence_ids[:1], dtype=torch.bool)
    first = torch.where(torch.cat([end, edge]), index, 0).cummax(0).values
    last = torch.where(torch.cat([edge, end]), index, index.numel()).flip(0).cummin(0).values.flip(0)
    return index, first, last


@dataclass(frozen=True)
class LossOutputs:
    """`loss`, summed over tokens, with gradient; `metric_sums`, detached tensors of any shape that add up over
    micro-batches and ranks."""

    loss: Tensor
    metric_sums: dict[str, Tensor]


class Objective(ABC):
    """Maps one micro-batch to SUMS over its tokens. The learner divides once by the global token count, so the gradient
    does not depend on how the batch is cut. `top_k` is the number of likeliest tokens that `LossInputs.top_masses`
    covers; 0 if unused."""

    top_k = 0

    @abstractmethod
    def __call__(self, tokens: LossInputs) -> LossOutputs:
        """Return the summed loss and metrics."""

    def grad_scale(self, metric_sums: Mapping[str, np.ndarray], num_tokens: int) -> float:
        """Return the factor of the step's gradient, given the sums over all its micro-batches and ranks."""
        return 1.0
