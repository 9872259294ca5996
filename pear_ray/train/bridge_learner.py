"""A learner of weights and low-rank adapters side by side, whose gradients can be looked at and
changed between the backward pass and the optimizer's step."""

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

# How an adapter's halves are called, behind the name of their layer.
A, B = ".lora_A", ".lora_B"


class MergedProduct(torch.autograd.Function):
    """x (W + scaling B A)^T. Where W is trained too, its gradient G gives those of the adapter,
    scaling B^T G and scaling G A^T: next to nothing, in time and in memory, beside what W alone
    costs. The sum is made anew in the backward pass: kept, it would be a whole model on each rank.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.scaling = scaling
        return x @ (weight + scaling * (lora_B @ lora_A)).T

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, lora_A, lora_B = ctx.saved_tensors
        (of_output,) = gradients
        of_x = of_output @ (weight + ctx.scaling * (lora_B @ lora_A))
        of_weight = of_output.flatten(0, -2).T @ x.flatten(0, -2)
        of_A = ctx.scaling * (lora_B.T @ of_weight)
        of_B = ctx.scaling * (of_weight @ lora_A.T)
        return of_x, of_weight, of_A, of_B, None


class LinearWithLora(nn.Module):
    """A linear layer with an adapter (arXiv 2106.09685) whose own weight is trained as well."""

    def __init__(self, linear: nn.Linear, lora: Lora) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        # Under ZeRO-3 the weight's own shape is that of a partition.
        num_out, num_in = getattr(linear.weight, "ds_shape", linear.weight.shape)
        like: dict[str, Any] = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.empty(lora.rank, num_in, **like))
        self.lora_B = nn.Parameter(torch.zeros(num_out, lora.rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self._scaling = lora.alpha / lora.rank

    def forward(self, x: Tensor) -> Tensor:
        product = MergedProduct.apply(x, self.weight, self.lora_A, self.lora_B, self._scaling)
        return product if self.bias is None else product + self.bias

    def merged(self) -> Tensor:
        """The weight with the adapter added."""
        return self.weight + self._scaling * (self.lora_B @ self.lora_A)


def add_lora(model: PreTrainedModel, lora: Lora) -> None:
    """Give the linear layers that `lora` names an adapter.

    Raises:
        ConfigError: the model has no such layer.
    """
    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in lora.targets
    ]
    if not found:
        raise ConfigError(f"cooperate.lora.targets: read {list(lora.targets)}; the model has none")
    for name, layer in found:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, LinearWithLora(layer, lora))


class WeightsAndLoraLearner(Learner):
    """Under ZeRO-3 alone: partitions of two such learners of one model and one number of ranks lie
    alike, so what goes from one to the other needs no communication."""

    def __init__(self, *learner: Any, lora: Lora, adapters_learning_rate: float) -> None:
        """As `Learner`, with adapters that learn at a rate of their own; 0 holds them fixed."""
        self._lora, self._adapters_learning_rate = lora, adapters_learning_rate
        super().__init__(*learner)

    def _trained(self, policy: PackedPolicy, optimizer: Optimizer) -> list[Any]:
        add_lora(policy.language_model, self._lora)
        named = list(policy.named_parameters())
        adapters = [parameter for name, parameter in named if name.endswith((A, B))]
        weights = [parameter for name, parameter in named if not name.endswith((A, B))]
        return [
            {"params": weights},
            {"params": adapters, "lr": self._adapters_learning_rate},
        ]

    def _whole_parameters(
        self, model: PreTrainedModel
    ) -> Iterator[tuple[str, list[Tensor], Callable[[], Tensor]]]:
        layers = {name: m for name, m in model.named_modules() if isinstance(m, LinearWithLora)}
        for name, parameter in model.named_parameters():
            layer = layers.get(name.removesuffix(".weight"))
            if layer is not None:
                yield name, [layer.weight, layer.lora_A, layer.lora_B], layer.merged
            elif not name.endswith((A, B)):
                yield name, [parameter], partial(Tensor.detach, parameter)

    def take_adapter_gradients(self) -> dict[str, Tensor]:
        """This rank's partitions of the adapters' gradients, which are 0 afterwards."""
        taken = {}
        for name, parameter in self._parameters(of_adapters=True):
            taken[name] = safe_get_local_grad(parameter).clone()
            safe_set_local_grad(parameter, taken[name] * 0)
        return taken

    def add_adapter_gradients(self, gradients: dict[str, Tensor], factor: float) -> None:
        """Add what another such learner gave, times `factor`."""
        for name, parameter in self._parameters(of_adapters=True):
            own = safe_get_local_grad(parameter)
            safe_set_local_grad(parameter, own + factor * gradients[name])

    def copy(self, other: WeightsAndLoraLearner, *, of_adapters: bool) -> None:
        """Take the other's adapters, or its weights."""
        theirs = dict(other._parameters(of_adapters))
        for name, parameter in self._parameters(of_adapters):
            value = safe_get_local_fp32_param(theirs[name])
            safe_set_local_fp32_param(parameter, value)
            parameter.ds_tensor.data.copy_(value)

    def _parameters(self, of_adapters: bool) -> Iterator[tuple[str, Any]]:
        for name, parameter in self._engine.module.named_parameters():
            if name.endswith((A, B)) is of_adapters:
                yield name, parameter
