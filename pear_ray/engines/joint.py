"""A learner of weights and low-rank adapters side by side, whose gradients can be looked at and
changed between the backward pass and the optimiser's step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_set_local_fp32_param,
    safe_set_local_grad,
)
from torch import Tensor

from pear_ray.config import Lora, Optimiser
from pear_ray.engines.learner import Learner
from pear_ray.engines.lora import add_adapters
from pear_ray.engines.model import PackedPolicy

OF_ADAPTER = ".lora_"


class JointLearner(Learner):
    """Under ZeRO-3 alone: partitions of two such learners of one model and one number of ranks lie
    alike, so what goes from one to the other needs no communication."""

    def __init__(self, *learner: Any, lora: Lora, adapters_learning_rate: float) -> None:
        """As `Learner`, with adapters that learn at a rate of their own; 0 holds them fixed."""
        self._lora, self._adapters_learning_rate = lora, adapters_learning_rate
        super().__init__(*learner)

    def _trained(self, policy: PackedPolicy, optimiser: Optimiser) -> list[Any]:
        add_adapters(policy.language_model, self._lora)
        policy.requires_grad_(True)
        adapters = [p for name, p in policy.named_parameters() if OF_ADAPTER in name]
        weights = [p for name, p in policy.named_parameters() if OF_ADAPTER not in name]
        return [
            {"params": weights},
            {"params": adapters, "lr": self._adapters_learning_rate},
        ]

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

    def copy(self, other: JointLearner, *, of_adapters: bool) -> None:
        """Take the other's adapters, or its weights."""
        theirs = dict(other._parameters(of_adapters))
        for name, parameter in self._parameters(of_adapters):
            value = safe_get_local_fp32_param(theirs[name])
            safe_set_local_fp32_param(parameter, value)
            parameter.ds_tensor.data.copy_(value)

    def _parameters(self, of_adapters: bool) -> Iterator[tuple[str, Any]]:
        for name, parameter in self._engine.module.named_parameters():
            if (OF_ADAPTER in name) is of_adapters:
                yield name, parameter
