"""A learner that can hold still, during one update, what another one moved most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param
from torch import Tensor

from pear_ray.train.learner import Learner


class FreezingLearner(Learner):
    """Under ZeRO-3 alone."""

    def values(self) -> dict[str, Tensor]:
        """A copy of this rank's partition of every trained parameter, float32."""
        return {name: safe_get_local_fp32_param(p).clone() for name, p in self._trainable()}

    def moved_most(self, before: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        """Of each parameter on its own, the `share` of its elements that changed most since
        `before`, as a mask of this rank's partition, bool. More where several changed as much as
        the last of them, and none that did not change."""
        found = {}
        for name, parameter in self._trainable():
            moved = (safe_get_local_fp32_param(parameter) - before[name]).abs()
            num_held = int(share * parameter.ds_numel)
            everywhere = [torch.empty_like(moved) for _ in range(dist.get_world_size())]
            dist.all_gather(everywhere, moved)
            largest = torch.cat(everywhere).topk(max(1, num_held)).values
            found[name] = (moved >= largest[-1]) & (moved > 0) & (num_held > 0)
        return found

    def put_back(self, values: dict[str, Tensor], where: dict[str, Tensor]) -> None:
        """Give elements the values that they had."""
        for name, parameter in self._trainable():
            now = safe_get_local_fp32_param(parameter)
            value = torch.where(where[name], values[name], now)
            safe_set_local_fp32_param(parameter, value)
            parameter.ds_tensor.data.copy_(value)

    def _trainable(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad:
                yield name, parameter
