"""Low-rank adapters through peft: small trained matrices beside frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pear_ray.config import Lora

ADAPTER = "default"


def add_adapters(model: PreTrainedModel, config: Lora) -> None:
    """Insert adapters into the model's linear layers and freeze all other parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    peft_config = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(config.targets)
    )
    inject_adapter_in_model(peft_config, model, adapter_name=ADAPTER)


def merged_parameters(model: PreTrainedModel) -> Iterator[tuple[str, list[Tensor], Callable[[], Tensor]]]:
    """Yield, for every parameter of the model without adapters: its name in the Hugging Face folder, the parameters to
    gather, and a function that merges the gathered ones."""
    adapted = {f"{name}.base_layer.weight": layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, parameter in model.named_parameters():
        plain_name = name.replace(".base_layer.", ".")
        if name in adapted:
            layer = adapted[name]
            parts = [parameter, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
            yield plain_name, parts, partial(merge_adapter, layer)
        elif ".lora_" not in name:
            yield plain_name, [parameter], partial(Tensor.detach, parameter)


def merge_adapter(layer: Any) -> Tensor:
    """Return the weight of an adapted layer plus its adapter's update."""
    return layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
