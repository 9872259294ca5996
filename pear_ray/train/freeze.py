"""A learner that can undo part of an update: the elements that an earlier one changed most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param
from torch import Tensor

from pear_ray.train.learner import Learner


class FreezingLearner(Learner):
    """A learner under ZeRO-3, which alone partitions each parameter by itself."""

    def snapshot(self) -> dict[str, Tensor]:
        """Copy this rank's partition of every trained parameter, float32."""
        return {name: safe_get_local_fp32_param(p).clone() for name, p in self._trainable()}

    def most_changed(self, before: dict[str, Tensor], frac: float) -> dict[str, Tensor]:
        """Return a mask of this rank's partitions, bool: the `frac` of each parameter's elements that changed most
        since the snapshot `before`. Ties for the last place are all included, unchanged elements never."""
        masks = {}
        for name, parameter in self._trainable():
            change = (safe_get_local_fp32_param(parameter) - before[name]).abs()
            num_frozen = int(frac * parameter.ds_numel)
            changes = [torch.empty_like(change) for _ in range(dist.get_world_size())]
            dist.all_gather(changes, change)
            largest = torch.cat(changes).topk(max(1, num_frozen)).values
            masks[name] = (change >= largest[-1]) & (change > 0) & (num_frozen > 0)
        return masks

    def reset(self, snapshot: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
        """Set the masked elements back to their values in the snapshot."""
        for name, parameter in self._trainable():
            value = safe_get_local_fp32_param(parameter)
            value = torch.where(masks[name], snapshot[name], value)
            safe_set_local_fp32_param(parameter, value)
            parameter.ds_tensor.data.copy_(value)

    def _trainable(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad:
                yield name, parameter
