"""Weight versions with low-rank adapters, merged on the engine's side: W + scaling B A (arXiv
2106.09685, section 4.1)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pear_ray.errors import ConfigError
from pear_ray.train.hf_folder import open_tensors
from pear_ray.train.lora import ADAPTER
from pear_ray.weights.fetch import WeightCache
from pear_ray.weights.publish import Partition
from pear_ray.weights.types import WeightVersion

SCALING = "lora_scaling"
# peft's names, and those of adapters beside trained weights (`train.bridge_learner`).
HALF = re.compile(rf"(.+)\.lora_([AB])(?:\.{ADAPTER}\.weight)?")


def adapter_partitions(partitions: Iterable[Partition], scaling: float) -> Iterator[Partition]:
    """Yield a rank's adapter partitions and `scaling` (alpha / rank), for an `AdapterCache`."""
    yield from with_scaling((part for part in partitions if HALF.fullmatch(part[0])), scaling)


def with_scaling(partitions: Iterable[Partition], scaling: float) -> Iterator[Partition]:
    """Yield a rank's partitions and `scaling`, which every rank sends, for a `MergedCache`."""
    yield from partitions
    yield SCALING, (), torch.tensor([scaling], dtype=torch.float64)


class MergedCache(WeightCache):
    """A `WeightCache` for versions of full weights and adapters beside them."""

    def fetch(self, version: WeightVersion, timeout_seconds: float) -> dict[str, Tensor]:
        """Return the parameters by their names in the Hugging Face folder, adapters merged.

        Raises as `WeightCache.fetch`; ValueError also if half of an adapter is missing.
        """
        weights = super().fetch(version, timeout_seconds)
        scaling, adapters = pop_adapters(weights, version)
        for layer, (lora_A, lora_B) in adapters.items():
            name = f"{layer}.weight"
            weights[name] = merge_lora(weights[name], lora_A, lora_B, scaling)
        return weights


class AdapterCache:
    """A cache for versions of adapters alone; the base weights come from `path`.

    `path` is the folder or hub name of the start model. Raises ConfigError if it has no safetensors files.
    """

    def __init__(self, path: str) -> None:
        self._folder = local_folder(path)
        self._cache = WeightCache()
        self._files = open_tensors(self._folder)
        if not self._files:
            raise ConfigError(f"{path}: expected *.safetensors files of the start model, got none")

    @property
    def version(self) -> int | None:
        """Return the cached version, as `WeightCache.version`."""
        return self._cache.version

    def fetch(self, version: WeightVersion, timeout_seconds: float) -> dict[str, Tensor]:
        """Return all parameters by their names in the folder, in the adapters' dtype.

        Weights without adapters are included: vLLM fuses them with adapted ones and loads all parts of a fused weight
        or none. Raises as `WeightCache.fetch`.

        Raises:
            ConfigError: the folder lacks an adapted weight, or has it in another shape.
            ValueError: half of an adapter, or the scaling, is missing.
        """
        scaling, adapters = pop_adapters(self._cache.fetch(version, timeout_seconds), version)
        merged = {}
        for layer, (lora_A, lora_B) in sorted(adapters.items()):
            name = f"{layer}.weight"
            base = self._base_weight(name, (len(lora_B), lora_A.shape[1]))
            merged[name] = merge_lora(base, lora_A, lora_B, scaling)
        dtype = next(iter(merged.values())).dtype
        others = self._files.keys() - merged.keys()
        return merged | {name: self._files[name].get_tensor(name).to(dtype) for name in others}

    def _base_weight(self, name: str, shape: tuple[int, int]) -> Tensor:
        weight = self._files[name].get_tensor(name) if name in self._files else None
        found = None if weight is None else tuple(weight.shape)
        if weight is None or found != shape:
            raise ConfigError(f"{self._folder}: {name}: expected shape {shape} of its adapter, got {found}")
        return weight


def pop_adapters(weights: dict[str, Tensor], version: WeightVersion) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """Remove the adapters from `weights`; return their scaling and each layer's (A, B)."""
    label = f"weights version {version.version}"
    if SCALING not in weights:
        raise ValueError(f"{label}: expected {SCALING} beside adapters, got none")
    scaling = float(weights.pop(SCALING))
    layers: dict[str, dict[str, Tensor]] = {}
    for name in list(weights):
        if match := HALF.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = weights.pop(name)
    for layer, halves in layers.items():
        if len(halves) < 2:
            raise ValueError(f"{label}: {layer}: expected lora_A and lora_B, got {set(halves)}")
    return scaling, {layer: (halves["A"], halves["B"]) for layer, halves in layers.items()}


def local_folder(path: str) -> Path:
    """Return `path`, or the folder to which the weights of a hub name are downloaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors"]))


def merge_lora(base: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return W + scaling B A in the adapter's dtype.

    The product of half-precision adapters is computed in float32 and rounded before the sum, as peft merges on CPUs.
    `base` [out, in], `lora_A` [rank, in], `lora_B` [out, rank].
    """
    wide = torch.promote_types(lora_A.dtype, torch.float32)
    product = lora_B.to(wide) @ lora_A.to(wide) * scaling
    return base.to(lora_A.dtype) + product.to(lora_A.dtype)
