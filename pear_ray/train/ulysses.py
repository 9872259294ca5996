"""Sequence parallelism as in DeepSpeed-Ulysses (arXiv 2309.14509): a group of ranks shares every pack. Each rank holds
a slice of its tokens, and inside attention all tokens of some heads (`attention.py`). The per-token outputs, a few
floats, are gathered over the group, so that weights which sum over a response see all of it, wherever it is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pear_ray.records import TrainingBatch

PADDED_FIELDS = (
    "token_ids_T",
    "trainable_T",
    "sampled_logprobs_T",
    "coefficients_T",
    "teacher_ids_T",
    "teacher_logprobs_T",
)


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share packs with this one, and this rank's index among them."""

    process_group: Any
    index: int
    size: int

    @classmethod
    def create(cls, size: int, timeout_seconds: float) -> SequenceGroup:
        """Group neighboring ranks by `size`; collective over all ranks."""
        timeout = timedelta(seconds=timeout_seconds)
        rank = dist.get_rank()
        # Every rank must take part in the creation of every group.
        groups = [
            dist.new_group(list(range(first, first + size)), timeout) for first in range(0, dist.get_world_size(), size)
        ]
        return cls(groups[rank // size], rank % size, size)

    def pad(self, batch: TrainingBatch) -> TrainingBatch:
        """Append an untrained sequence so that the number of tokens divides by the group size."""
        num_padding = -len(batch.token_ids_T) % self.size
        if not num_padding:
            return batch

        def padded(values: np.ndarray | None, fill: int = 0) -> Any:
            if values is None:
                return None
            padding = np.full((num_padding, *values.shape[1:]), fill, values.dtype)
            return np.concatenate([values, padding])

        fields: dict[str, Any] = {name: padded(getattr(batch, name)) for name in PADDED_FIELDS}
        return replace(
            batch,
            position_ids_T=np.concatenate([batch.position_ids_T, np.arange(num_padding)]),
            sequence_ids_T=padded(batch.sequence_ids_T, fill=len(batch.origins)),
            origins=(*batch.origins, ""),
            **fields,
        )

    def slice_inputs(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], slice]:
        """Return this rank's slice of `model.policy_inputs`, and the slice of the predictions that its hidden states
        make; each predicts the next token."""
        num_tokens = len(inputs["packed_ids_T"]) // self.size
        start = self.index * num_tokens
        edges = torch.tensor([start, start + num_tokens], device=inputs["predicted"].device)
        first, end = torch.searchsorted(inputs["predicted"] - 1, edges).tolist()
        tokens, own = slice(start, start + num_tokens), slice(first, end)
        sliced = {
            "packed_ids_T": inputs["packed_ids_T"][tokens],
            "position_ids_T": inputs["position_ids_T"][tokens],
            "token_ids": inputs["token_ids"][own],
            "predicted": inputs["predicted"][own] - start,
            "group": self.process_group,
        }
        return {**inputs, **sliced}, own

    def gather(self, values: Tensor, own: slice, num_predictions: int) -> Tensor:
        """Return the group's values [num_predictions, ...], of which this rank has computed `own`. Only these carry a
        gradient: summed over ranks, gradients are those of the whole pack."""
        gathered = values.new_zeros((num_predictions, *values.shape[1:]))
        gathered[own] = values.detach()
        dist.all_reduce(gathered, group=self.process_group)
        return torch.cat([gathered[: own.start], values, gathered[own.stop :]])
