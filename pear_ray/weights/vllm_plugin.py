"""The engine `ray_object_store` that vLLM loads through its plugin entry point: takes named
tensors in the layout of a Hugging Face folder and loads them into the live model, or into a spare
one, which takes the live one's place, while that is at work."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from pear_ray.engines.generator import WEIGHT_TRANSFER


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Whoever holds a manifest can pull: there is nothing to agree on, but whether a spare model
    is to take what comes."""

    with_spare: bool = False


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Whole parameters by name."""

    tensors: Mapping[str, Tensor]


class RayObjectStoreEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives in checkpoint layout; vLLM fuses, shards and repacks as it does from disk."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    model: Any
    standby: Any = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Make the spare model, before the live one is at work."""
        if init_info.with_spare and can_be_exchanged(self.model):
            self.standby, self._named = spare_of(self.model, self.vllm_config)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class does, without its device synchronization, which a CPU refuses."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.model.load_weights(iter(update_info.tensors.items()))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model, self.device.type)

    def fill_spare(self, tensors: Mapping[str, Tensor]) -> None:
        """Load into the spare model; the live one may be at work in another thread."""
        self.set_weight_update_target(self.standby, self.model_config)
        try:
            with set_current_vllm_config(self.vllm_config):
                self.start_weight_update()
                self.receive_weights(UpdateInfo(tensors))
                self.finish_weight_update()
        finally:
            self.reset_weight_update_target()

    def exchange(self, runner: Any) -> None:
        """Have vLLM's model runner use the spare model, which makes the live one the spare."""
        # What two modules hold cannot be exchanged instead: vLLM's operators keep methods that are
        # bound to their module, and would go on with its old weights without an error.
        self.model, self.standby = self.standby, self.model
        runner.model = self._default_model = self.model
        named = self.vllm_config.compilation_config.static_forward_context
        for name in self._named:
            named[name], self._named[name] = self._named[name], named[name]

    def shutdown(self) -> None:
        """Holds nothing."""


def can_be_exchanged(model: nn.Module) -> bool:
    """Whether a model's attention holds no weights, and is found by its name: that of the live
    model, with its cache of keys and values, then serves the spare one as well."""
    layers = [layer for layer in model.modules() if is_deferred_attention_layer(layer)]
    return all(type(layer) is Attention and not layer.use_direct_call for layer in layers)


def spare_of(model: nn.Module, config: VllmConfig) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Another model of the same modules, with weights that mean nothing, and those of its modules
    that vLLM finds by name, but for attention."""
    compilation = config.compilation_config
    # Only one layer may have a name.
    of_live, compilation.static_forward_context = compilation.static_forward_context, {}
    try:
        device = next(model.parameters()).device
        with set_default_torch_dtype(config.model_config.dtype), device:
            standby = initialize_model(config)
            own_what_is_shared(standby, set(model.modules()))
            record_metadata_for_reloading(standby)
            process_weights_after_loading(standby, config.model_config, device)
        named = compilation.static_forward_context
    finally:
        compilation.static_forward_context = of_live
    others = {n: layer for n, layer in named.items() if not is_deferred_attention_layer(layer)}
    return standby.eval(), others


def own_what_is_shared(standby: nn.Module, of_live: set[nn.Module]) -> None:
    """vLLM makes a rotary embedding once in a process: give the spare model one of its own."""
    copies: dict[int, Any] = {}
    for parent in list(standby.modules()):
        for name, child in parent.named_children():
            if child in of_live:
                setattr(parent, name, copy.deepcopy(child, copies))


def repack_tied_head(model: nn.Module, device: str) -> None:
    """On CPU the output head multiplies by a repacked copy of its weight. With tied embeddings a
    reload renews the embedding but not that copy, and log-probs are silently wrong."""
    head = getattr(model, "lm_head", None)
    if device == "cpu" and head is not None:
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def register() -> None:
    """Entry point `vllm.general_plugins`: called by vLLM in each of its processes."""
    if WEIGHT_TRANSFER not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            WEIGHT_TRANSFER, "pear_ray.weights.vllm_plugin", "RayObjectStoreEngine"
        )
