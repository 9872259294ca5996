"""Generator side: buckets of all ranks become whole tensors again."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from pear_ray.weights.delta import apply
from pear_ray.weights.publish import checksum
from pear_ray.weights.types import Bucket, ParamMeta, WeightVersion


class BaseMissing(RuntimeError):
    """A version is told as changes to one that the replica does not hold; it needs a full one."""


class WeightCache:
    """One process's parameters, brought up to date version by version.

    Where buckets say that deltas may follow (`Bucket.may_be_base`) the replica keeps what it
    assembled, of `version`, and writes the next one into the same memory. Where they do not it
    keeps nothing, and the parameters of a single rank stay where they are in the store.
    """

    def __init__(self) -> None:
        self.version: int | None = None
        self._flats: dict[ParamMeta, np.ndarray] = {}

    def fetch(self, version: WeightVersion, timeout_seconds: float) -> dict[str, Tensor]:
        """The parameters of a version by name, whole. They are to be read, not written, and hold
        until the next call.

        The store sends each bucket to a node once, however many processes on it ask. A full bucket
        is copied once from there, into the parameters, or not at all (see the class).

        Raises:
            TimeoutError: the buckets did not all come in time; names version, rank and bucket.
                What the replica holds stays.
            LookupError: a bucket has gone with the process that published it. The same.
            BaseMissing: a bucket is a delta on another version than the replica holds. It forgets
                what it held, and only a full version helps.
            ValueError: a rank's partition is missing, or bytes are not those that were published.
                The same.
        """
        objects = pull(version, timeout_seconds)
        base, self.version = self.version, None
        held, self._flats = self._flats, {}
        require_all_ranks(version)
        flats: dict[ParamMeta, np.ndarray] = {}
        for number, (bucket, items) in enumerate(zip(version.buckets, objects, strict=True)):
            label = label_of(version, number)
            if bucket.base_version not in (None, base):
                raise BaseMissing(
                    f"{label}: what changed since version {bucket.base_version}; this replica holds"
                    f" {'none' if base is None else f'version {base}'} and needs a full version"
                )
            try:
                if version.num_ranks == 1 and not bucket.may_be_base:
                    flats |= zip(bucket.entries, items, strict=True)
                    parts = items
                else:
                    flats |= room(bucket, version.num_ranks, held | flats)
                    parts = write(bucket, items, flats)
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from error
            if checksum(parts) != bucket.checksum:
                raise ValueError(f"{label}: checksum differs from the published one")
        if any(bucket.may_be_base for bucket in version.buckets):
            self.version, self._flats = version.version, flats
        return {entry.name: tensor(entry, flat) for entry, flat in flats.items()}


def pull(version: WeightVersion, timeout_seconds: float) -> list[Any]:
    """The buckets' objects, in order, in this node's part of the store.

    Raises:
        TimeoutError: they did not all come in time; names version, rank and bucket.
        LookupError: one has gone with the process that published it.
    """
    end = time.monotonic() + timeout_seconds
    references = [bucket.reference[0] for bucket in version.buckets]
    # All travel at once; taken one by one they also would be waited for one by one.
    ray.wait(references, num_returns=len(references), timeout=timeout_seconds)
    objects = []
    for number, reference in enumerate(references):
        label = label_of(version, number)
        try:
            objects.append(ray.get(reference, timeout=max(0.0, end - time.monotonic())))
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(f"{label}: not fetched within {timeout_seconds:.0f} s") from error
        except ray.exceptions.ObjectLostError as error:
            raise LookupError(f"{label}: no longer in the store, its publisher has gone") from error
    return objects


def label_of(version: WeightVersion, number: int) -> str:
    """What errors call a bucket."""
    rank = version.buckets[number].rank
    return f"weights version {version.version}, rank {rank}, bucket {number}"


def require_all_ranks(version: WeightVersion) -> None:
    """Every parameter must come once from every rank, alike in dtype, shape and size."""
    ranks: dict[ParamMeta, list[int]] = {}
    for bucket in version.buckets:
        for entry in bucket.entries:
            ranks.setdefault(entry, []).append(bucket.rank)
    for entry, found in ranks.items():
        if sorted(found) != list(range(version.num_ranks)):
            raise ValueError(
                f"weights version {version.version}: {entry.name} lacks a rank's partition:"
                f" read those of ranks {sorted(found)}, expected one of each of"
                f" {version.num_ranks}"
            )


def room(
    bucket: Bucket, num_ranks: int, known: dict[ParamMeta, np.ndarray]
) -> dict[ParamMeta, np.ndarray]:
    """For each parameter of a bucket the bytes of all ranks, flat: known ones, or new and empty."""
    found = {}
    for entry in bucket.entries:
        flat = known.get(entry)
        # After a restart there may be more or fewer ranks, with partitions of the same size.
        if flat is None or flat.nbytes != num_ranks * entry.num_bytes:
            flat = np.empty(num_ranks * entry.num_bytes, np.uint8)
        found[entry] = flat
    return found


def write(bucket: Bucket, items: list[Any], flats: dict[ParamMeta, np.ndarray]) -> list[np.ndarray]:
    """Bring the rank's partitions up to date; returns them."""
    parts = []
    for entry, item in zip(bucket.entries, items, strict=True):
        part = flats[entry][bucket.rank * entry.num_bytes :][: entry.num_bytes]
        if bucket.base_version is None:
            np.copyto(part, item.view(np.uint8))
        else:
            apply(item, part.view(item.values.dtype))
        parts.append(part)
    return parts


def tensor(entry: ParamMeta, flat: np.ndarray) -> Tensor:
    """The parameter in the bytes of all ranks. Partitions are padded to equal size; what is behind
    the last element is padding."""
    # Unlike from_numpy, DLPack takes memory that is read-only, as the store's is.
    elements = torch.from_dlpack(flat).view(getattr(torch, entry.dtype))
    return elements[: math.prod(entry.shape)].view(entry.shape)
