"""vLLM's weight-transfer engine `ray_object_store`: loads tensors in the layout of a Hugging Face folder into the live
model, or into a standby model that replaces it, while the live one still generates."""

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
from vllm.model_executor.model_loader import reload
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from pear_ray.engines.generator import WEIGHT_TRANSFER


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Whether to build a standby model."""

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
        """Build the standby model, before the live one is in use.

        Only if all attention layers hold no weights and are looked up by name: the live model's attention, with its KV
        cache, then serves the standby model as well.
        """
        layers = [layer for layer in self.model.modules() if is_deferred_attention_layer(layer)]
        if init_info.with_standby and all(type(layer) is Attention and not layer.use_direct_call for layer in layers):
            self.standby, self._named_layers = build_standby(self.model, self.vllm_config)

    def start_weight_update(self) -> None:
        """Restore the checkpoint layout of the target model's parameters."""
        reload.initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load parameters without the base class's device synchronization, which CPUs refuse."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load parameters into the target model."""
        self.model.load_weights(iter(update_info.tensors.items()))

    def finish_weight_update(self) -> None:
        """Repack the target model's parameters for its kernels."""
        reload.finalize_layerwise_reload(self.model, self.model_config)
        # On CPUs the output head multiplies by a packed copy of its weight. With tied embeddings vLLM's reload updates
        # only the embedding, and log-probs are silently wrong.
        head = getattr(self.model, "lm_head", None)
        if self.device.type == "cpu" and head is not None:
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)

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


def build_standby(model: nn.Module, config: VllmConfig) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return a copy of `model` without its weights, and its layers, except attention, that vLLM looks up by name."""
    compilation = config.compilation_config
    # vLLM refuses a second layer of the same name.
    live_layers, compilation.static_forward_context = compilation.static_forward_context, {}
    try:
        device = next(model.parameters()).device
        with set_default_torch_dtype(config.model_config.dtype), device:
            standby = initialize_model(config)
            # vLLM caches rotary embeddings by process: copy modules shared with the live model.
            live_modules, copies = set(model.modules()), dict[int, Any]()
            children = [(parent, *child) for parent in standby.modules() for child in parent.named_children()]
            for parent, name, child in children:
                if child in live_modules:
                    setattr(parent, name, copy.deepcopy(child, copies))
            reload.record_metadata_for_reloading(standby)
            process_weights_after_loading(standby, config.model_config, device)
        layers = compilation.static_forward_context
    finally:
        compilation.static_forward_context = live_layers
    return standby.eval(), {n: layer for n, layer in layers.items() if not is_deferred_attention_layer(layer)}


def register() -> None:
    """Register the engine; called by vLLM (`vllm.general_plugins`) in each of its processes."""
    if WEIGHT_TRANSFER not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(WEIGHT_TRANSFER, RayObjectStoreEngine)
