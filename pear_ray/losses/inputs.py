"""What an objective sees, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """The n trainable tokens of one micro-batch, with what the model in training says of them.

    `logprobs`, `entropies`, `sampled_logprobs`, `coefficients` and `top_masses` are float32 [n],
    of which only `logprobs` has a gradient; `sequence_ids` int64 [n]; `origins` one string for
    each sequence. `num_tokens_global` counts the trainable tokens of the whole step and
    `num_sequences_global` its sequences that have one which is not a trace's. For distillation
    `teacher_logprobs` and `logprobs_of_teacher` float32 [n, k] are the behavior policy's log-probs
    of its k likeliest tokens, and the model's own of the same tokens, with gradient. For a KL
    penalty `reference_logprobs` float32 [n] are the reference policy's of the same tokens as
    `logprobs`. Where a step learns from rollouts and traces, `from_trace` bool [n] says which are a
    trace's; `num_trace_tokens_global` and `num_trace_sequences_global` count those of the whole
    step.
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
    from_trace: Tensor | None = None
    num_trace_tokens_global: int = 0
    num_trace_sequences_global: int = 0

    @property
    def num_sequences(self) -> int:
        """Sequences in the micro-batch, those without trainable tokens included."""
        return len(self.origins)

    def of_rollouts(self) -> LossInputs:
        """Those that are not a trace's, in a step of their own."""
        if self.from_trace is None:
            return replace(self, num_tokens_global=self.num_rollout_tokens_global)
        return self._where(
            ~self.from_trace, self.num_rollout_tokens_global, self.num_sequences_global
        )

    def of_traces(self) -> LossInputs:
        """Those that are a trace's, in a step of their own."""
        chosen = self.from_trace
        if chosen is None:
            chosen = torch.zeros_like(self.sequence_ids, dtype=torch.bool)
        return self._where(chosen, self.num_trace_tokens_global, self.num_trace_sequences_global)

    @property
    def num_rollout_tokens_global(self) -> int:
        """Trainable tokens of the whole step that are not a trace's."""
        return self.num_tokens_global - self.num_trace_tokens_global

    def _where(self, chosen: Tensor, num_tokens: int, num_sequences: int) -> LossInputs:
        arrays: dict[str, Any] = {
            field.name: value[chosen]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(
            self, num_tokens_global=num_tokens, num_sequences_global=num_sequences, **arrays
        )

    def sums_by_sequence(self, values: Tensor) -> Tensor:
        """Sum of `values` [n] over each sequence's tokens, [sequences]."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence_ids, values)

    def lengths(self) -> Tensor:
        """Trainable tokens of each sequence, int64 [sequences]."""
        return self.sums_by_sequence(torch.ones_like(self.sequence_ids))

    def means_by_sequence(self, values: Tensor) -> Tensor:
        """Mean of `values` [n] over each sequence's tokens, [sequences]; 0 where there is none."""
        return self.sums_by_sequence(values) / self.lengths().clamp(min=1)

    def relative_positions(self) -> tuple[Tensor, Tensor]:
        """Where each token stands in its sequence, 0 to below 1, and whether it is first."""
        ids = self.sequence_ids
        index = torch.arange(ids.numel(), device=ids.device)
        is_first = torch.ones_like(ids, dtype=torch.bool)
        is_first[1:] = ids[1:] != ids[:-1]
        first = torch.where(is_first, index, 0).cummax(0).values
        return (index - first) / self.lengths()[ids], is_first


@dataclass(frozen=True)
class LossOutputs:
    """A loss with gradient, and additive facts (tensors of any shape, without gradient)."""

    loss: Tensor
    facts: dict[str, Tensor]


class Objective(Protocol):
    """Maps one micro-batch to SUMS over its tokens; the learner divides once by the global token
    count, so that no split of the batch changes the gradient."""

    @property
    def top_k(self) -> int:
        """How many likeliest tokens `tokens.top_masses` must count; 0 where it is not looked at."""

    def __call__(self, tokens: LossInputs) -> LossOutputs:
        """The loss, summed, and what there is to say of it."""

    def factor(self, facts: Mapping[str, np.ndarray], num_tokens: int) -> float:
        """What the step's gradient is multiplied by at its end, given the facts summed over all
        micro-batches and ranks; 1 for most."""
