"""The engine `ray_object_store` that vLLM loads through its plugin entry point: takes named
tensors in the layout of a Hugging Face folder and loads them into the live model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from pear_ray.engines.generator import WEIGHT_TRANSFER


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on: whoever holds a manifest can pull."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Whole parameters by name."""

    tensors: dict[str, Tensor]


class RayObjectStoreEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives in checkpoint layout; vLLM fuses, shards and repacks as it does from disk."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class does, without its device synchronisation, which a CPU refuses."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.model.load_weights(iter(update_info.tensors.items()))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self._repack_tied_head()

    def shutdown(self) -> None:
        """Holds nothing."""

    def _repack_tied_head(self) -> None:
        # On CPU the output head multiplies by a repacked copy of its weight. With tied embeddings
        # a reload renews the embedding but not that copy, and log-probs are silently wrong.
        head = getattr(self.model, "lm_head", None)
        if self.device.type != "cpu" or head is None:
            return
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def register() -> None:
    """Entry point `vllm.general_plugins`: called by vLLM in each of its processes."""
    if WEIGHT_TRANSFER not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            WEIGHT_TRANSFER, "pear_ray.weights.receive", "RayObjectStoreEngine"
        )
