"""Low-rank adapters through peft: a few weights are trained beside the frozen ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pear_ray.config import Lora

ADAPTER = "default"


def add_adapters(model: PreTrainedModel, settings: Lora) -> None:
    """Put adapters into the model's linear layers and freeze everything else."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def merged_parameters(
    model: PreTrainedModel,
) -> Iterator[tuple[str, list[Tensor], Callable[[], Tensor]]]:
    """Of every parameter of the model without adapters: its name in the Hugging Face folder, the
    parameters that must be whole to know it, and how it is made of them."""
    adapted = {
        f"{name}.base_layer.weight": layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    for name, parameter in model.named_parameters():
        if name in adapted:
            layer = adapted[name]
            pieces = [parameter, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
            yield name.replace(".base_layer.", "."), pieces, partial(merge, layer)
        elif ".lora_" not in name:
            yield name.replace(".base_layer.", "."), [parameter], partial(Tensor.detach, parameter)


def merge(layer: Any) -> Tensor:
    """The weight of an adapted layer with its adapter added."""
    return layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
