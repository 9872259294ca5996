"""Engine side: assemble whole tensors from the buckets of all ranks."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from pear_ray.weights.publish import apply_delta, checksum
from pear_ray.weights.registry import Bucket, ParamMeta, WeightVersion


class WeightCache:
    """One process's copy of the parameters, updated version by version.

    If deltas may follow (`Bucket.may_be_base`), the cache keeps the parameters of `version` and writes the next version
    into the same memory. Otherwise it keeps nothing, and those of a single rank are read from the store without a copy.
    """

    def __init__(self) -> None:
        self.version: int | None = None
        # Bytes of all ranks' partitions of each parameter.
        self._flats: dict[ParamMeta, np.ndarray] = {}

    def fetch(self, version: WeightVersion, timeout_seconds: float) -> dict[str, Tensor]:
        """Return the parameters of `version` by name; read-only, and valid until the next call.

        The store sends each bucket once to each node. The first two errors leave the cache unchanged, others empty it.

        Raises:
            TimeoutError: a bucket did not arrive in time.
            LookupError: the process that published a bucket has died.
            RuntimeError: a bucket is a delta from another version than the cached one; a full version is needed.
            ValueError: a rank's partition is missing, or bytes differ from the published ones.
        """
        objects = get_objects(version, timeout_seconds)
        base, self.version = self.version, None
        flats, self._flats = self._flats, {}
        check_all_ranks(version)
        for bucket, (label, items) in zip(version.buckets, objects.items(), strict=True):
            if bucket.base_version not in (None, base):
                cached = "none" if base is None else f"version {base}"
                raise RuntimeError(f"{label}: expected cached version {bucket.base_version}, got {cached}")
            try:
                if version.num_ranks == 1 and not bucket.may_be_base:
                    flats |= zip(bucket.params, items, strict=True)
                    partitions = items
                else:
                    partitions = write_partitions(bucket, version.num_ranks, items, flats)
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from error
            if checksum(partitions) != bucket.checksum:
                raise ValueError(f"{label}: checksum differs from the published one")
        flats = {meta: flats[meta] for bucket in version.buckets for meta in bucket.params}
        if any(bucket.may_be_base for bucket in version.buckets):
            self.version, self._flats = version.version, flats
        # Unlike from_numpy, DLPack accepts the read-only memory of the store. Padding is at the end.
        elements = {meta: torch.from_dlpack(flat).view(getattr(torch, meta.dtype)) for meta, flat in flats.items()}
        return {meta.name: flat[: math.prod(meta.shape)].view(meta.shape) for meta, flat in elements.items()}


def get_objects(version: WeightVersion, timeout_seconds: float) -> dict[str, Any]:
    """Return the objects of all buckets by name; raises TimeoutError and LookupError as `fetch`."""
    deadline = time.monotonic() + timeout_seconds
    references = [bucket.reference[0] for bucket in version.buckets]
    # Pull all at once: a loop of ray.get would transfer them one after the other.
    ray.wait(references, num_returns=len(references), timeout=timeout_seconds)
    objects = {}
    for number, bucket in enumerate(version.buckets):
        label = f"weights version {version.version}, rank {bucket.rank}, bucket {number}"
        try:
            objects[label] = ray.get(bucket.reference[0], timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(f"{label}: not fetched within {timeout_seconds:.0f} s") from error
        except ray.exceptions.ObjectLostError as error:
            raise LookupError(f"{label}: lost from the store, its publisher died") from error
    return objects


def check_all_ranks(version: WeightVersion) -> None:
    """Raise ValueError unless each parameter has one partition of each rank, of equal layout."""
    ranks: dict[ParamMeta, list[int]] = {}
    for bucket in version.buckets:
        for meta in bucket.params:
            ranks.setdefault(meta, []).append(bucket.rank)
    expected = list(range(version.num_ranks))
    for meta, found in ranks.items():
        if sorted(found) != expected:
            label = f"weights version {version.version}: {meta.name}"
            raise ValueError(f"{label}: expected partitions of ranks {expected}, got {sorted(found)}")


def write_partitions(
    bucket: Bucket, num_ranks: int, items: list[Any], flats: dict[ParamMeta, np.ndarray]
) -> list[np.ndarray]:
    """Write the rank's partitions into `flats`, which may hold those of an older version; return views of them."""
    partitions = []
    for meta, item in zip(bucket.params, items, strict=True):
        flat = flats.get(meta)
        # Restarted learners may have another number of ranks and partitions of the same size.
        if flat is None or flat.nbytes != num_ranks * meta.num_bytes:
            flat = flats[meta] = np.empty(num_ranks * meta.num_bytes, np.uint8)
        partition = flat[bucket.rank * meta.num_bytes :][: meta.num_bytes]
        if bucket.base_version is None:
            np.copyto(partition, item.view(np.uint8))
        else:
            apply_delta(item, partition.view(item.values.dtype))
        partitions.append(partition)
    return partitions
