"""Low-rank adapters alone travel, and are merged where they arrive: W + scaling B A
(arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pear_ray.errors import ConfigError
from pear_ray.train.lora import ADAPTER
from pear_ray.train.hf_folder import open_tensors
from pear_ray.weights.fetch import WeightCache
from pear_ray.weights.types import WeightVersion

SCALING = "lora_scaling"
# Of an adapter beside a weight that is trained too (`engines.joint`).
HALVES = (".lora_A", ".lora_B")
A, B = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def adapter_partitions(
    partitions: Iterable[tuple[str, tuple[int, ...], Tensor]], scaling: float
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Of a rank's partitions those of adapters, and behind them `scaling` (alpha / rank), which
    every rank sends: what a `Publisher` publishes for an `AdapterCache`."""
    adapters = (part for part in partitions if part[0].endswith((A, B)))
    yield from with_scaling(adapters, scaling)


def with_scaling(
    partitions: Iterable[tuple[str, tuple[int, ...], Tensor]], scaling: float
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """A rank's partitions and behind them `scaling`: what a `Publisher` publishes of weights and
    adapters for a `MergedCache`."""
    yield from partitions
    yield SCALING, (), torch.tensor([scaling], dtype=torch.float64)


class MergedCache(WeightCache):
    """Like `Replica`, of versions that hold weights and the adapters beside them."""

    def fetch(self, version: WeightVersion, timeout_seconds: float) -> dict[str, Tensor]:
        """The parameters of a version by their names in the Hugging Face folder, adapters merged.

        Raises:
            TimeoutError, LookupError, BaseMissing, ValueError: as `Replica.fetch`.
        """
        found = dict(super().fetch(version, timeout_seconds))
        scaling = float(found.pop(SCALING))
        halves = {name: found.pop(name) for name in list(found) if name.endswith(HALVES)}
        for name in halves:
            layer = name.removesuffix(HALVES[0])
            if layer != name:
                lora_A, lora_B = halves[name], halves[layer + HALVES[1]]
                found[layer + ".weight"] = merge(found[layer + ".weight"], lora_A, lora_B, scaling)
        return found


class AdapterCache:
    """Like `Replica`, of versions that hold adapters: all else comes from the Hugging Face folder
    or hub name that training started from.

    Raises:
        ConfigError: the folder holds no safetensors.
    """

    def __init__(self, path: str) -> None:
        self._folder, self._adapters = local_folder(path), WeightCache()
        self._files = open_tensors(self._folder)
        if not self._files:
            raise ConfigError(f"{path}: read no *.safetensors, expected those of the start model")

    @property
    def version(self) -> int | None:
        """As `Replica.version`."""
        return self._adapters.version

    def fetch(self, version: WeightVersion, timeout_seconds: float) -> dict[str, Tensor]:
        """The parameters of a version by their names in the folder, in the adapters' dtype: merged
        where they are adapted, the folder's own where they are not. An engine fuses adapted weights
        with others, and loads all of them or none.

        Raises:
            ConfigError: the folder lacks a weight that is adapted, or has one of another shape.
            TimeoutError, LookupError, BaseMissing, ValueError: as `Replica.fetch`.
        """
        adapters = self._adapters.fetch(version, timeout_seconds)
        label = f"weights version {version.version}"
        if SCALING not in adapters:
            raise ValueError(f"{label}: lacks {SCALING}, expected adapters and their scaling")
        scaling = float(adapters.pop(SCALING))
        layers = {name.removesuffix(A).removesuffix(B) for name in adapters}
        merged = {}
        for layer in sorted(layers):
            for name in (layer + A, layer + B):
                if name not in adapters:
                    raise ValueError(f"{label}: lacks {name}, half of an adapter")
            lora_A, lora_B = adapters[layer + A], adapters[layer + B]
            base = self._base(f"{layer}.weight", (len(lora_B), lora_A.shape[1]))
            merged[f"{layer}.weight"] = merge(base, lora_A, lora_B, scaling)
        dtype = next(iter(adapters.values())).dtype
        others = self._files.keys() - merged.keys()
        return merged | {name: self._files[name].get_tensor(name).to(dtype) for name in others}

    def _base(self, name: str, shape: tuple[int, int]) -> Tensor:
        if name not in self._files:
            raise ConfigError(f"{self._folder}: read no {name}, which is adapted")
        weight = self._files[name].get_tensor(name)
        if weight.shape != shape:
            raise ConfigError(
                f"{self._folder}: {name}: read shape {tuple(weight.shape)}, expected {shape} as"
                " its adapter has"
            )
        return weight


def local_folder(path: str) -> Path:
    """The folder itself, or the one to which a hub name's weights are downloaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors"]))


def merge(base: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + scaling B A in the adapter's dtype. The product of half-precision adapters is taken in
    float32 and rounded before it is added, as peft does when it merges on a CPU.

    `base` [out, in], `lora_A` [rank, in], `lora_B` [out, rank].
    """
    wide = torch.promote_types(lora_A.dtype, torch.float32)
    product = lora_B.to(wide) @ lora_A.to(wide) * scaling
    return base.to(lora_A.dtype) + product.to(lora_A.dtype)
