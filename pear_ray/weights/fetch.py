"""Engine side: assemble whole tensors from the buckets of all ranks."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from pear_ray.weights.delta import apply_delta
from pear_ray.weights.publish import checksum
from pear_ray.weights.types import Bucket, ParamMeta, WeightVersion


class BaseMissing(RuntimeError):
    """A bucket is a delta from a version that the cache does not hold; fetch a full version."""


class WeightCache:
    """One process's copy of the parameters, updated version by version.

    If deltas may follow (`Bucket.may_be_base`), the cache keeps the parameters of `version` and writes the next version
    into the same memory. Otherwise it keeps nothing, and those of a single rank are read from the store without a copy.
    """

    def __init__(self) -> None:
        self.version: int | None = None
        self._flats: dict[ParamMeta, np.ndarray] = {}

    def fetch(self, version: WeightVersion, timeout_seconds: float) -> dict[str, Tensor]:
        """Return the parameters of `version` by name; read-only, and valid until the next call.

        The store sends each bucket once to each node. The first two errors leave the cache as it is, the others empty
        it.

        Raises:
            TimeoutError: a bucket did not arrive in time.
            LookupError: the process that published a bucket has died.
            BaseMissing: a bucket is a delta from another version than the cached one.
            ValueError: a rank's partition is missing, or bytes differ from the published ones.
        """
        objects = get_objects(version, timeout_seconds)
        base, self.version = self.version, None
        held, self._flats = self._flats, {}
        check_all_ranks(version)
        flats: dict[ParamMeta, np.ndarray] = {}
        for number, (bucket, items) in enumerate(zip(version.buckets, objects, strict=True)):
            label = bucket_label(version, number)
            if bucket.base_version not in (None, base):
                cached = "none" if base is None else f"version {base}"
                raise BaseMissing(f"{label}: expected cached version {bucket.base_version}, got {cached}")
            try:
                if version.num_ranks == 1 and not bucket.may_be_base:
                    flats |= zip(bucket.params, items, strict=True)
                    partitions = items
                else:
                    flats |= allocate(bucket, version.num_ranks, held | flats)
                    partitions = write_partitions(bucket, items, flats)
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from error
            if checksum(partitions) != bucket.checksum:
                raise ValueError(f"{label}: checksum differs from the published one")
        if any(bucket.may_be_base for bucket in version.buckets):
            self.version, self._flats = version.version, flats
        return {meta.name: to_tensor(meta, flat) for meta, flat in flats.items()}


def get_objects(version: WeightVersion, timeout_seconds: float) -> list[Any]:
    """Return the objects of all buckets; raises TimeoutError and LookupError as `fetch`."""
    deadline = time.monotonic() + timeout_seconds
    references = [bucket.reference[0] for bucket in version.buckets]
    # Pull all at once: a loop of ray.get would transfer them one after the other.
    ray.wait(references, num_returns=len(references), timeout=timeout_seconds)
    objects = []
    for number, reference in enumerate(references):
        label = bucket_label(version, number)
        try:
            objects.append(ray.get(reference, timeout=max(0.0, deadline - time.monotonic())))
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(f"{label}: not fetched within {timeout_seconds:.0f} s") from error
        except ray.exceptions.ObjectLostError as error:
            raise LookupError(f"{label}: lost from the store, its publisher died") from error
    return objects


def bucket_label(version: WeightVersion, number: int) -> str:
    """Return the name of a bucket for error messages."""
    rank = version.buckets[number].rank
    return f"weights version {version.version}, rank {rank}, bucket {number}"


def check_all_ranks(version: WeightVersion) -> None:
    """Raise ValueError unless each parameter has one partition of each rank, of equal layout."""
    ranks: dict[ParamMeta, list[int]] = {}
    for bucket in version.buckets:
        for meta in bucket.params:
            ranks.setdefault(meta, []).append(bucket.rank)
    expected = list(range(version.num_ranks))
    for meta, found in ranks.items():
        if sorted(found) != expected:
            raise ValueError(
                f"weights version {version.version}: {meta.name}: expected partitions of ranks"
                f" {expected}, got {sorted(found)}"
            )


def allocate(bucket: Bucket, num_ranks: int, held: dict[ParamMeta, np.ndarray]) -> dict[ParamMeta, np.ndarray]:
    """Return flat bytes for all ranks' partitions of each parameter, those in `held` if any."""
    flats = {}
    for meta in bucket.params:
        flat = held.get(meta)
        # Restarted learners may have another number of ranks and partitions of the same size.
        if flat is None or flat.nbytes != num_ranks * meta.num_bytes:
            flat = np.empty(num_ranks * meta.num_bytes, np.uint8)
        flats[meta] = flat
    return flats


def write_partitions(bucket: Bucket, items: list[Any], flats: dict[ParamMeta, np.ndarray]) -> list[np.ndarray]:
    """Write the rank's partitions into `flats`; return views of them."""
    partitions = []
    for meta, item in zip(bucket.params, items, strict=True):
        partition = flats[meta][bucket.rank * meta.num_bytes :][: meta.num_bytes]
        if bucket.base_version is None:
            np.copyto(partition, item.view(np.uint8))
        else:
            apply_delta(item, partition.view(item.values.dtype))
        partitions.append(partition)
    return partitions


def to_tensor(meta: ParamMeta, flat: np.ndarray) -> Tensor:
    """Return the parameter in the bytes of all ranks, without the padding at their end."""
    # Unlike from_numpy, DLPack accepts the read-only memory of the store.
    elements = torch.from_dlpack(flat).view(getattr(torch, meta.dtype))
    return elements[: math.prod(meta.shape)].view(meta.shape)
