"""Learners of stage `cooperate`: MIFO's undoes part of an update, BRIDGE's trains weights and adapters side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_set_local_fp32_param,
    safe_set_local_grad,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from pear_ray.config import Lora, Optimizer
from pear_ray.errors import ConfigError
from pear_ray.train.learner import Learner
from pear_ray.train.model import PackedPolicy

LORA_SUFFIXES = (".lora_A", ".lora_B")


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
            set_partition(parameter, torch.where(masks[name], snapshot[name], safe_get_local_fp32_param(parameter)))

    def _trainable(self) -> Iterator[tuple[str, Any]]:
        return ((name, p) for name, p in self._engine.module.named_parameters() if p.requires_grad)


class MergedProduct(torch.autograd.Function):
    """x (W + scaling B A)^T. With the gradient G of W, which is trained too, those of the adapter are scaling B^T G and
    scaling G A^T: nearly free in time and memory. The backward pass computes the merged weight again; saving it would
    keep a whole model on each rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.scaling = scaling
        return x @ (weight + scaling * (lora_B @ lora_A)).T

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, lora_A, lora_B = ctx.saved_tensors
        (grad_output,) = gradients
        grad_x = grad_output @ (weight + ctx.scaling * (lora_B @ lora_A))
        grad_weight = grad_output.flatten(0, -2).T @ x.flatten(0, -2)
        grad_A = ctx.scaling * (lora_B.T @ grad_weight)
        grad_B = ctx.scaling * (grad_weight @ lora_A.T)
        return grad_x, grad_weight, grad_A, grad_B, None


class LinearWithLora(nn.Module):
    """A linear layer with an adapter (arXiv 2106.09685) whose own weight is trained too."""

    def __init__(self, linear: nn.Linear, config: Lora) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        # Under ZeRO-3 the shape of the weight itself is a partition's.
        num_out, num_in = getattr(linear.weight, "ds_shape", linear.weight.shape)
        like: dict[str, Any] = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.empty(config.rank, num_in, **like))
        self.lora_B = nn.Parameter(torch.zeros(num_out, config.rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self._scaling = config.alpha / config.rank

    def forward(self, x: Tensor) -> Tensor:
        product = MergedProduct.apply(x, self.weight, self.lora_A, self.lora_B, self._scaling)
        return product if self.bias is None else product + self.bias

    def merged_weight(self) -> Tensor:
        """Return the weight plus the adapter's update."""
        return self.weight + self._scaling * (self.lora_B @ self.lora_A)


class WeightsAndLoraLearner(Learner):
    """A learner under ZeRO-3 whose gradients are accessible between `backward` and `update`. Two of them with one model
    and one number of ranks are partitioned alike, so gradients and values move between them without communication."""

    def __init__(self, *learner: Any, lora: Lora, lora_learning_rate: float) -> None:
        """As `Learner`, with a learning rate for the adapters; 0 freezes them."""
        self._lora = lora
        self._lora_learning_rate = lora_learning_rate
        super().__init__(*learner)

    def take_lora_gradients(self) -> dict[str, Tensor]:
        """Return this rank's partitions of the adapters' gradients and set them to 0."""
        taken = {}
        for name, parameter in self._parameters["lora"].items():
            taken[name] = safe_get_local_grad(parameter).clone()
            safe_set_local_grad(parameter, taken[name] * 0)
        return taken

    def add_lora_gradients(self, gradients: dict[str, Tensor], factor: float) -> None:
        """Add `factor` times the gradients that another learner returned."""
        for name, parameter in self._parameters["lora"].items():
            safe_set_local_grad(parameter, safe_get_local_grad(parameter) + factor * gradients[name])

    def copy_from(self, other: WeightsAndLoraLearner, kind: Literal["lora", "weights"]) -> None:
        """Copy the other learner's adapters or weights: this rank's partitions of them."""
        for name, parameter in self._parameters[kind].items():
            set_partition(parameter, safe_get_local_fp32_param(other._parameters[kind][name]))

    def _trained_parameters(self, policy: PackedPolicy, optimizer: Optimizer) -> list[Any]:
        model, targets = policy.language_model, self._lora.targets
        layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        adapted = [name for name in layers if name.rpartition(".")[2] in targets]
        if not adapted:
            raise ConfigError(
                f"cooperate.lora.targets: expected names of linear layers of the model, got {list(targets)}"
            )
        for name in adapted:
            model.set_submodule(name, LinearWithLora(model.get_submodule(name), self._lora))
        named = dict(policy.named_parameters())
        adapters = {name: parameter for name, parameter in named.items() if name.endswith(LORA_SUFFIXES)}
        weights = {name: parameter for name, parameter in named.items() if name not in adapters}
        self._parameters = {"lora": adapters, "weights": weights}
        return [{"params": [*weights.values()]}, {"params": [*adapters.values()], "lr": self._lora_learning_rate}]

    def _export_parameters(self, model: PreTrainedModel) -> Iterator[tuple[str, list[Tensor], Callable[[], Tensor]]]:
        layers = {name: m for name, m in model.named_modules() if isinstance(m, LinearWithLora)}
        for name, parameter in model.named_parameters():
            layer = layers.get(name.removesuffix(".weight"))
            if layer is not None:
                yield name, [layer.weight, layer.lora_A, layer.lora_B], layer.merged_weight
            elif not name.endswith(LORA_SUFFIXES):
                yield name, [parameter], partial(Tensor.detach, parameter)


def set_partition(parameter: Any, value: Tensor) -> None:
    """Set this rank's partition in the optimizer and in the model."""
    safe_set_local_fp32_param(parameter, value)
    parameter.ds_tensor.data.copy_(value)
