"""Learner side: put a rank's parameter partitions into the object store, without a gather, in full or as deltas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import ray
import torch
import xxhash
from torch import Tensor

from pear_ray.weights.registry import Bucket, ParamMeta, RankShard

# A rank's part of one parameter: name, full shape, flat tensor.
Partition = tuple[str, tuple[int, ...], Tensor]
# Offsets in a block of a delta fit into 16 bits.
BLOCK_ELEMENTS = 65_536


class Delta(NamedTuple):
    """The changed elements of a flat array, in order. Each takes two bytes and its own size."""

    counts: np.ndarray  # of changed elements in each block of 65,536, uint32 [blocks]
    offsets: np.ndarray  # their positions in the block, uint16 [changed]
    values: np.ndarray  # their new values, of the array's dtype [changed]

    @property
    def nbytes(self) -> int:
        """Return the size of the three arrays, like `ndarray.nbytes`."""
        return self.counts.nbytes + self.offsets.nbytes + self.values.nbytes


def compute_delta(old: np.ndarray, new: np.ndarray, max_bytes: int) -> Delta | None:
    """Return the delta from `old` to `new`, lossless; None if it is larger than `max_bytes`.

    Both are flat and of the same length and unsigned dtype, so that -0.0 differs from 0.0 and a NaN equals itself.
    """
    counts = np.zeros(-(-len(new) // BLOCK_ELEMENTS), np.uint32)
    offsets, values = [np.empty(0, np.uint16)], [np.empty(0, new.dtype)]
    bytes_left = max_bytes - counts.nbytes
    # Blocks of both arrays fit into the CPU cache; one pass over all is slower and takes memory.
    for number, start in enumerate(range(0, len(new), BLOCK_ELEMENTS)):
        block = new[start : start + BLOCK_ELEMENTS]
        changed = np.flatnonzero(old[start : start + BLOCK_ELEMENTS] != block)
        counts[number] = len(changed)
        offsets.append(changed.astype(np.uint16))
        values.append(block[changed])
        bytes_left -= offsets[-1].nbytes + values[-1].nbytes
        if bytes_left < 0:
            return None
    return Delta(counts, np.concatenate(offsets), np.concatenate(values))


def apply_delta(delta: Delta, flat: np.ndarray) -> None:
    """Update `flat` in place; raise ValueError if the delta is inconsistent or does not fit."""
    num_changed = int(delta.counts.sum(dtype=np.int64))
    if num_changed != len(delta.offsets):
        raise ValueError(f"delta: expected {num_changed} offsets, got {len(delta.offsets)}")
    blocks = np.arange(len(delta.counts)) * BLOCK_ELEMENTS
    indices = np.repeat(blocks, delta.counts) + delta.offsets
    if indices.max(initial=-1) >= len(flat):
        raise ValueError(f"delta: expected indices below {len(flat)}, got {indices.max()}")
    flat[indices] = delta.values


def checksum(arrays: Iterable[np.ndarray]) -> int:
    """Return the XXH3 (64 bits) of the concatenated bytes of flat arrays."""
    digest = xxhash.xxh3_64()
    for array in arrays:
        digest.update(array.data)
    return digest.intdigest()


class Publisher:
    """Publishes versions of one rank's partitions, in full or as deltas.

    A version is full if it is the first, was requested, crosses a multiple of `full_every`, or is not newer than the
    last one. In other versions each bucket is a delta from the version before, unless the delta is larger than half the
    bucket. Ranks need no coordination: full and delta buckets may stand in one version. If `full_every` > 1, a copy of
    the last published partitions stays in host memory.
    """

    def __init__(self, rank: int, bucket_mib: int, full_every: int) -> None:
        self._rank = rank
        self._bucket_bytes = bucket_mib * 2**20
        self._full_every = full_every
        self._published: dict[str, np.ndarray] = {}
        self._last_version: int | None = None

    def publish(self, partitions: Iterable[Partition], version: int, full: bool = False) -> RankShard:
        """Put `partitions` into the store: the same ones, in the same order, in every version.

        Buckets have up to `bucket_mib`, or one larger partition, and live as long as this process and their references.
        """
        # None until this version is complete: after a failure the next version is full.
        base, self._last_version = self._last_version, None
        every = self._full_every
        if base is not None and (full or version <= base or version // every > base // every):
            base = None
        buckets, num_bytes = [], 0
        for params, arrays in self._buckets(partitions):
            deltas = None if base is None else self._deltas(params, arrays)
            items = arrays if deltas is None else deltas
            num_bytes += sum(item.nbytes for item in items)
            base_version = None if deltas is None else base
            # A list: Ray copies the buffers of pickled numpy arrays straight into the store.
            reference = [ray.put(items)]
            buckets.append(Bucket(reference, self._rank, checksum(arrays), tuple(params), base_version, every > 1))
            if every > 1:
                self._remember(params, arrays, deltas)
        self._last_version = version
        return RankShard(version, self._rank, tuple(buckets), num_bytes)

    def _buckets(self, partitions: Iterable[Partition]) -> Iterator[tuple[list[ParamMeta], list[np.ndarray]]]:
        # Arrays of unsigned integers: numpy has no bfloat16.
        params: list[ParamMeta] = []
        arrays: list[np.ndarray] = []
        num_bytes = 0
        for name, shape, tensor in partitions:
            flat = tensor.cpu().contiguous().view(torch.uint8).numpy()
            if params and num_bytes + flat.nbytes > self._bucket_bytes:
                yield params, arrays
                params, arrays, num_bytes = [], [], 0
            num_bytes += flat.nbytes
            params.append(ParamMeta(name, str(tensor.dtype).removeprefix("torch."), shape, flat.nbytes))
            arrays.append(flat.view(f"u{tensor.element_size()}"))
        if params:
            yield params, arrays

    def _deltas(self, params: list[ParamMeta], arrays: list[np.ndarray]) -> list[Delta] | None:
        bytes_left = sum(array.nbytes for array in arrays) // 2
        deltas = []
        for meta, array in zip(params, arrays, strict=True):
            delta = compute_delta(self._published[meta.name], array, bytes_left)
            if delta is None:
                return None
            bytes_left -= delta.nbytes
            deltas.append(delta)
        return deltas

    def _remember(self, params: list[ParamMeta], arrays: list[np.ndarray], deltas: list[Delta] | None) -> None:
        for number, (meta, array) in enumerate(zip(params, arrays, strict=True)):
            if deltas is not None:
                apply_delta(deltas[number], self._published[meta.name])
            else:
                np.copyto(self._published.setdefault(meta.name, np.empty_like(array)), array)
