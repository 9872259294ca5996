"""vLLM's weight-transfer engine `ray_object_store`: loads named tensors into a running engine.

Tensors are in the layout of a Hugging Face folder. They are loaded into the live model, or into a standby model that
replaces it, while the live one still generates.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
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
    """Whether to build a standby model. There is no communicator to set up."""

    with_standby: bool = False


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Whole parameters by name."""

    tensors: Mapping[str, Tensor]


class RayObjectStoreEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads weights as vLLM does from disk: fused, sharded and repacked."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    model: Any
    standby: Any = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Build the standby model, before the live one is in use."""
        if init_info.with_standby and supports_standby(self.model):
            self.standby, self._named_layers = build_standby(self.model, self.vllm_config)

    def start_weight_update(self) -> None:
        """Restore the checkpoint layout of the target model's parameters."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load parameters without the base class's device synchronization, which CPUs refuse."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load parameters into the target model."""
        self.model.load_weights(iter(update_info.tensors.items()))

    def finish_weight_update(self) -> None:
        """Repack the target model's parameters for its kernels."""
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model, self.device.type)

    def load_standby(self, tensors: Mapping[str, Tensor]) -> None:
        """Load `tensors` into the standby model; another thread may run the live one."""
        self.set_weight_update_target(self.standby, self.model_config)
        try:
            with set_current_vllm_config(self.vllm_config):
                self.start_weight_update()
                self.receive_weights(UpdateInfo(tensors))
                self.finish_weight_update()
        finally:
            self.reset_weight_update_target()

    def swap_standby(self, runner: Any) -> None:
        """Let vLLM's model runner use the standby model; the live one becomes the standby."""
        # Swapping parameters between the modules fails silently: vLLM's CPU kernels hold methods bound to their module
        # and would go on with its old weights.
        self.model, self.standby = self.standby, self.model
        runner.model = self._default_model = self.model
        layers = self.vllm_config.compilation_config.static_forward_context
        for name in self._named_layers:
            layers[name], self._named_layers[name] = self._named_layers[name], layers[name]

    def shutdown(self) -> None:
        """Do nothing: there is no communicator to close."""


def supports_standby(model: nn.Module) -> bool:
    """Return whether all attention layers hold no weights and are looked up by name.

    The live model's attention, with its KV cache, then serves the standby model as well.
    """
    layers = [layer for layer in model.modules() if is_deferred_attention_layer(layer)]
    return all(type(layer) is Attention and not layer.use_direct_call for layer in layers)


def build_standby(model: nn.Module, config: VllmConfig) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return a copy of the architecture of `model`, with uninitialized weights, and its layers that vLLM looks up by
    name, except attention."""
    compilation = config.compilation_config
    # vLLM refuses a second layer of the same name.
    live_layers, compilation.static_forward_context = compilation.static_forward_context, {}
    try:
        device = next(model.parameters()).device
        with set_default_torch_dtype(config.model_config.dtype), device:
            standby = initialize_model(config)
            copy_shared_modules(standby, set(model.modules()))
            record_metadata_for_reloading(standby)
            process_weights_after_loading(standby, config.model_config, device)
        layers = compilation.static_forward_context
    finally:
        compilation.static_forward_context = live_layers
    named = {n: layer for n, layer in layers.items() if not is_deferred_attention_layer(layer)}
    return standby.eval(), named


def copy_shared_modules(standby: nn.Module, live_modules: set[nn.Module]) -> None:
    """Replace modules shared with the live model: vLLM caches rotary embeddings by process."""
    copies: dict[int, Any] = {}
    for parent in list(standby.modules()):
        for name, child in parent.named_children():
            if child in live_modules:
                setattr(parent, name, copy.deepcopy(child, copies))


def repack_tied_head(model: nn.Module, device: str) -> None:
    """Repack the output head on CPUs, where it multiplies by a packed copy of its weight.

    With tied embeddings vLLM's reload updates only the embedding, and log-probs are silently wrong.
    """
    head = getattr(model, "lm_head", None)
    if device == "cpu" and head is not None:
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def register() -> None:
    """Register the engine; called by vLLM (`vllm.general_plugins`) in each of its processes."""
    if WEIGHT_TRANSFER not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            WEIGHT_TRANSFER, "pear_ray.weights.vllm_plugin", "RayObjectStoreEngine"
        )
