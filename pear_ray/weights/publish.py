"""Learner side: put a rank's parameter partitions into the object store, without a gather."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import ray
import torch
import xxhash
from torch import Tensor

from pear_ray.weights.delta import Delta, apply_delta, compute_delta
from pear_ray.weights.types import Bucket, ParamMeta, RankShard

# A rank's part of one parameter: name, full shape, flat tensor.
Partition = tuple[str, tuple[int, ...], Tensor]
# The same, with the elements as unsigned integers of their size.
_BitPartition = tuple[ParamMeta, np.ndarray]


class Publisher:
    """Publishes versions of one rank's partitions, in full or as deltas.

    A version is full if it is the first, was requested, crosses a multiple of `full_every`, or is not newer than the
    last one. In other versions each bucket is a delta from the version before, unless the delta is larger than half the
    bucket. Ranks need no coordination: full and delta buckets may stand in one version.

    If `full_every` > 1, a copy of the last published partitions stays in host memory.
    """

    def __init__(self, rank: int, bucket_mib: int, full_every: int) -> None:
        self._rank = rank
        self._bucket_bytes = bucket_mib * 2**20
        self._full_every = full_every
        self._published: dict[str, np.ndarray] = {}
        self._last_version: int | None = None

    def publish(self, partitions: Iterable[Partition], version: int, full: bool = False) -> RankShard:
        """Put `partitions` into the store: the same ones, in the same order, in every version.

        Buckets have up to `bucket_mib`, or one larger partition. Their objects live as long as this process and their
        references. Each full bucket is copied once.
        """
        # None until this version is complete: after a failure the next version is full.
        base, self._last_version = self._last_version, None
        every = self._full_every
        if base is not None and (full or version <= base or version // every > base // every):
            base = None
        buckets, num_bytes = [], 0
        for bucket in self._buckets(partitions):
            deltas = None if base is None else self._deltas(bucket)
            items = [bits for _, bits in bucket] if deltas is None else deltas
            # A list: Ray copies the buffers of pickled numpy arrays straight into the store.
            reference = ray.put(items)
            num_bytes += sum(item.nbytes for item in items)
            buckets.append(
                Bucket(
                    [reference],
                    self._rank,
                    checksum(bits for _, bits in bucket),
                    tuple(meta for meta, _ in bucket),
                    base_version=None if deltas is None else base,
                    may_be_base=self._full_every > 1,
                )
            )
            if self._full_every > 1:
                self._remember(bucket, deltas)
        self._last_version = version
        return RankShard(version, self._rank, tuple(buckets), num_bytes)

    def _buckets(self, partitions: Iterable[Partition]) -> Iterator[list[_BitPartition]]:
        bucket: list[_BitPartition] = []
        num_bytes = 0
        for name, shape, tensor in partitions:
            # numpy has no bfloat16: view the bits as unsigned integers.
            flat = tensor.cpu().contiguous().view(torch.uint8).numpy()
            if bucket and num_bytes + flat.nbytes > self._bucket_bytes:
                yield bucket
                bucket, num_bytes = [], 0
            dtype = str(tensor.dtype).removeprefix("torch.")
            meta = ParamMeta(name, dtype, shape, flat.nbytes)
            bucket.append((meta, flat.view(f"u{tensor.element_size()}")))
            num_bytes += flat.nbytes
        if bucket:
            yield bucket

    def _deltas(self, bucket: list[_BitPartition]) -> list[Delta] | None:
        bytes_left = sum(bits.nbytes for _, bits in bucket) // 2
        deltas = []
        for meta, bits in bucket:
            delta = compute_delta(self._published[meta.name], bits, bytes_left)
            if delta is None:
                return None
            bytes_left -= delta.nbytes
            deltas.append(delta)
        return deltas

    def _remember(self, bucket: list[_BitPartition], deltas: list[Delta] | None) -> None:
        for number, (meta, bits) in enumerate(bucket):
            if deltas is not None:
                apply_delta(deltas[number], self._published[meta.name])
            elif meta.name in self._published:
                np.copyto(self._published[meta.name], bits)
            else:
                self._published[meta.name] = bits.copy()


def checksum(arrays: Iterable[np.ndarray]) -> int:
    """Return the XXH3 (64 bits) of the concatenated bytes of flat arrays."""
    digest = xxhash.xxh3_64()
    for array in arrays:
        digest.update(array.data)
    return digest.intdigest()
