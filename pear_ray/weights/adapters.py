"""Versions with low-rank adapters, merged on the engine's side: W + scaling B A (arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pear_ray.errors import ConfigError
from pear_ray.train.hf_folder import open_tensors
from pear_ray.train.model import ADAPTER
from pear_ray.weights.fetch import WeightCache
from pear_ray.weights.publish import Partition
from pear_ray.weights.registry import WeightVersion

SCALING = "lora_scaling"
# peft's names, and those of adapters beside trained weights (`train.cooperate_learners`).
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
        """As `WeightCache.fetch`, adapters merged; ValueError also if half of one, or the scaling, is missing."""
        weights = super().fetch(version, timeout_seconds)
        return weights | merge_adapters(weights, version, lambda name, shape: weights[name])


class AdapterCache(WeightCache):
    """A cache for versions of adapters alone; ConfigError if `path` (folder or hub name) has no base weights."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._folder = local_folder(path)
        self._files = open_tensors(self._folder)
        if not self._files:
            raise ConfigError(f"{path}: expected *.safetensors files of the start model, got none")

    def fetch(self, version: WeightVersion, timeout_seconds: float) -> dict[str, Tensor]:
        """Return all parameters by their names in the folder, in the adapters' dtype.

        Weights without adapters too: vLLM fuses them with adapted ones and loads all parts of a fused weight or none.
        Raises as `MergedCache.fetch`; ConfigError if the folder lacks an adapted weight or has it in another shape.
        """
        merged = merge_adapters(super().fetch(version, timeout_seconds), version, self._base_weight)
        dtype = next(iter(merged.values())).dtype
        others = {name: file for name, file in self._files.items() if name not in merged}
        return merged | {name: file.get_tensor(name).to(dtype) for name, file in others.items()}

    def _base_weight(self, name: str, shape: tuple[int, int]) -> Tensor:
        weight = self._files[name].get_tensor(name) if name in self._files else None
        found = None if weight is None else tuple(weight.shape)
        if weight is None or found != shape:
            raise ConfigError(f"{self._folder}: {name}: expected shape {shape} of its adapter, got {found}")
        return weight


def merge_adapters(
    weights: dict[str, Tensor], version: WeightVersion, base_weight: Callable[[str, tuple[int, int]], Tensor]
) -> dict[str, Tensor]:
    """Remove the adapters from `weights`; return the adapted weights, merged. `base_weight(name, shape)` returns W."""
    label = f"weights version {version.version}"
    if SCALING not in weights:
        raise ValueError(f"{label}: expected {SCALING} beside adapters, got none")
    scaling = float(weights.pop(SCALING))
    layers: dict[str, dict[str, Tensor]] = {}
    for name in list(weights):
        if match := HALF.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = weights.pop(name)
    merged = {}
    for layer, halves in sorted(layers.items()):
        if len(halves) < 2:
            raise ValueError(f"{label}: {layer}: expected lora_A and lora_B, got {set(halves)}")
        name, lora_A, lora_B = f"{layer}.weight", halves["A"], halves["B"]
        merged[name] = merge_lora(base_weight(name, (len(lora_B), lora_A.shape[1])), lora_A, lora_B, scaling)
    return merged


def local_folder(path: str) -> Path:
    """Return `path`, or the folder to which the weights of a hub name are downloaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors"]))


def merge_lora(base: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return W + scaling B A in the adapter's dtype: `base` [out, in], `lora_A` [rank, in], `lora_B` [out, rank].

    The product of half-precision adapters is computed in float32 and rounded before the sum, as peft merges on CPUs.
    """
    wide = torch.promote_types(lora_A.dtype, torch.float32)
    product = lora_B.to(wide) @ lora_A.to(wide) * scaling
    return base.to(lora_A.dtype) + product.to(lora_A.dtype)
