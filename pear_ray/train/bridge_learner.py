"""A learner that trains weights and low-rank adapters side by side, for BRIDGE."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
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
        named = dict(self._engine.module.named_parameters())
        self._adapters = {n: p for n, p in named.items() if n.endswith(LORA_SUFFIXES)}
        self._weights = {n: p for n, p in named.items() if n not in self._adapters}

    def take_lora_gradients(self) -> dict[str, Tensor]:
        """Return this rank's partitions of the adapters' gradients and set them to 0."""
        taken = {}
        for name, parameter in self._adapters.items():
            taken[name] = safe_get_local_grad(parameter).clone()
            safe_set_local_grad(parameter, taken[name] * 0)
        return taken

    def add_lora_gradients(self, gradients: dict[str, Tensor], factor: float) -> None:
        """Add `factor` times the gradients that another learner returned."""
        for name, parameter in self._adapters.items():
            own = safe_get_local_grad(parameter)
            safe_set_local_grad(parameter, own + factor * gradients[name])

    def copy_weights(self, other: WeightsAndLoraLearner) -> None:
        """Copy the other learner's weights, without its adapters."""
        copy_values(other._weights, self._weights)

    def copy_lora(self, other: WeightsAndLoraLearner) -> None:
        """Copy the other learner's adapters."""
        copy_values(other._adapters, self._adapters)

    def _trained_parameters(self, policy: PackedPolicy, optimizer: Optimizer) -> list[Any]:
        add_lora(policy.language_model, self._lora)
        named = list(policy.named_parameters())
        adapters = [parameter for name, parameter in named if name.endswith(LORA_SUFFIXES)]
        weights = [parameter for name, parameter in named if not name.endswith(LORA_SUFFIXES)]
        return [{"params": weights}, {"params": adapters, "lr": self._lora_learning_rate}]

    def _export_parameters(self, model: PreTrainedModel) -> Iterator[tuple[str, list[Tensor], Callable[[], Tensor]]]:
        layers = {name: m for name, m in model.named_modules() if isinstance(m, LinearWithLora)}
        for name, parameter in model.named_parameters():
            layer = layers.get(name.removesuffix(".weight"))
            if layer is not None:
                yield name, [layer.weight, layer.lora_A, layer.lora_B], layer.merged_weight
            elif not name.endswith(LORA_SUFFIXES):
                yield name, [parameter], partial(Tensor.detach, parameter)


def add_lora(model: PreTrainedModel, config: Lora) -> None:
    """Replace the linear layers that `config.targets` names by `LinearWithLora`.

    Raises:
        ConfigError: the model has no such layer.
    """
    targets = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in config.targets
    ]
    if not targets:
        raise ConfigError(
            f"cooperate.lora.targets: expected names of linear layers of the model, got {list(config.targets)}"
        )
    for name, layer in targets:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LinearWithLora(layer, config))


def copy_values(source: dict[str, Any], target: dict[str, Any]) -> None:
    """Copy this rank's partitions from the parameters of one learner to those of another."""
    for name, parameter in target.items():
        value = safe_get_local_fp32_param(source[name])
        safe_set_local_fp32_param(parameter, value)
        parameter.ds_tensor.data.copy_(value)
