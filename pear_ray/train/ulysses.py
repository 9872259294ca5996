"""Sequence parallelizm as in DeepSpeed-Ulysses (arXiv 2309.14509): the ranks of a group share every
pack. Each holds a stretch of its tokens; in attention it holds all tokens of some heads instead
(`attention.py`). What the model says of each token, a few floats, is then told to the whole group,
so that weights which sum over a response see all of it, wherever it was cut.
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


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share packs with this one, and its place among them."""

    ranks: Any
    place: int
    size: int

    @classmethod
    def of(cls, size: int, timeout_seconds: float) -> SequenceGroup:
        """Neighbouring ranks, `size` in each group; a collective of all ranks."""
        timeout = timedelta(seconds=timeout_seconds)
        rank, groups = dist.get_rank(), []
        for first in range(0, dist.get_world_size(), size):
            groups.append(dist.new_group(list(range(first, first + size)), timeout))
        return cls(groups[rank // size], rank % size, size)

    def padded(self, batch: TrainingBatch) -> TrainingBatch:
        """The pack with one more sequence, of which nothing is learned, so that every rank holds
        as many tokens."""
        if not (num_more := -len(batch.token_ids_T) % self.size):
            return batch

        def longer(values: np.ndarray | None, fill: int = 0) -> Any:
            if values is None:
                return None
            rest = np.full((num_more, *values.shape[1:]), fill, values.dtype)
            return np.concatenate([values, rest])

        changed: dict[str, Any] = {
            name: longer(getattr(batch, name))
            for name in (
                "token_ids_T", "trainable_T", "sampled_logprobs_T", "coefficients_T",
                "teacher_ids_T", "teacher_logprobs_T",
            )
        }  # fmt: skip
        return replace(
            batch,
            position_ids_T=np.concatenate([batch.position_ids_T, np.arange(num_more)]),
            sequence_ids_T=longer(batch.sequence_ids_T, fill=len(batch.origins)),
            origins=(*batch.origins, ""),
            **changed,
        )

    def stretch(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], slice]:
        """This rank's part of `model.policy_inputs`, and which of the predictions are its own:
        those that its hidden states make, each of the token behind it."""
        num_tokens = len(inputs["packed_ids_T"]) // self.size
        start = self.place * num_tokens
        edges = torch.tensor([start, start + num_tokens], device=inputs["predicted"].device)
        first, end = torch.searchsorted(inputs["predicted"] - 1, edges).tolist()
        here, own = slice(start, start + num_tokens), slice(first, end)
        cut = {
            "packed_ids_T": inputs["packed_ids_T"][here],
            "position_ids_T": inputs["position_ids_T"][here],
            "token_ids": inputs["token_ids"][own],
            "predicted": inputs["predicted"][own] - start,
            "group": self.ranks,
        }
        return {**inputs, **cut}, own

    def joined(self, values: Tensor, own: slice, num_predictions: int) -> Tensor:
        """The group's values [num_predictions, ...] of which each rank gives its own, and has the
        gradient of its own only: summed over ranks, gradients are those of the whole pack."""
        joined = values.new_zeros((num_predictions, *values.shape[1:]))
        joined[own] = values.detach()
        dist.all_reduce(joined, group=self.ranks)
        return torch.cat([joined[: own.start], values, joined[own.stop :]])
