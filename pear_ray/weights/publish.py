"""Learner side: a rank's partitions become buckets in the object store. Nothing is gathered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import ray
import torch
import xxhash
from torch import Tensor

from pear_ray.weights.delta import Delta, apply, difference
from pear_ray.weights.types import Bucket, ParamMeta, RankShard

# A partition's description and its elements as unsigned integers of their size.
Piece = tuple[ParamMeta, np.ndarray]


class Publisher:
    """Puts versions of one rank's partitions into the object store, whole or as what changed.

    A version is full when it is the first, when it is asked for, when its number is or has passed
    a multiple of `full_every`, and when it is no newer than the last one. Ranks agree on multiples
    without a word, whatever each of them was asked for. In other versions each bucket is a delta
    from the version before, unless the delta would be longer than half of the bucket: then that
    bucket is full. Only its rank can know that, and nobody else has to: a version may hold both.

    With `full_every` 1 there are no deltas. Otherwise the publisher keeps a copy, in main memory,
    of what it last published. A full bucket is copied once, from the partitions into the store
    (partitions on a GPU first into main memory).
    """

    def __init__(self, rank: int, bucket_mib: int, full_every: int) -> None:
        self._rank, self._bucket_bytes, self._full_every = rank, bucket_mib * 2**20, full_every
        self._published: dict[str, np.ndarray] = {}
        self._last: int | None = None

    def publish(
        self,
        partitions: Iterable[tuple[str, tuple[int, ...], Tensor]],
        version: int,
        full: bool = False,
    ) -> RankShard:
        """Put this rank's partitions (name, full shape, flat tensor) into the store, the same ones
        in the same order in every version.

        A bucket is closed when the next partition would make it longer than `bucket_mib`. Its
        object lives as long as this process and its reference do.
        """
        # After a failure half way nothing is known about the copy, and the next version is full.
        base, self._last = self._last, None
        every = self._full_every
        if base is not None and (full or version <= base or version // every > base // every):
            base = None
        buckets, num_bytes = [], 0
        for pieces in self._groups(partitions):
            deltas = None if base is None else self._deltas(pieces)
            items = [data for _, data in pieces] if deltas is None else deltas
            # A list: pickled, numpy's bytes go from where they are straight into the store.
            reference = ray.put(items)
            num_bytes += sum(item.nbytes for item in items)
            buckets.append(
                Bucket(
                    [reference],
                    self._rank,
                    checksum(data for _, data in pieces),
                    tuple(entry for entry, _ in pieces),
                    base_version=None if deltas is None else base,
                    may_be_base=self._full_every > 1,
                )
            )
            if self._full_every > 1:
                self._remember(pieces, deltas)
        self._last = version
        return RankShard(version, self._rank, tuple(buckets), num_bytes)

    def _groups(
        self, partitions: Iterable[tuple[str, tuple[int, ...], Tensor]]
    ) -> Iterator[list[Piece]]:
        pieces: list[Piece] = []
        num_bytes = 0
        for name, shape, tensor in partitions:
            # numpy has no bfloat16; bits have no dtype, and the entry keeps it.
            flat = tensor.cpu().contiguous().view(torch.uint8).numpy()
            if pieces and num_bytes + flat.nbytes > self._bucket_bytes:
                yield pieces
                pieces, num_bytes = [], 0
            dtype = str(tensor.dtype).removeprefix("torch.")
            entry = ParamMeta(name, dtype, shape, flat.nbytes)
            pieces.append((entry, flat.view(f"u{tensor.element_size()}")))
            num_bytes += flat.nbytes
        if pieces:
            yield pieces

    def _deltas(self, pieces: list[Piece]) -> list[Delta] | None:
        left = sum(data.nbytes for _, data in pieces) // 2
        deltas = []
        for entry, data in pieces:
            delta = difference(self._published[entry.name], data, left)
            if delta is None:
                return None
            left -= delta.nbytes
            deltas.append(delta)
        return deltas

    def _remember(self, pieces: list[Piece], deltas: list[Delta] | None) -> None:
        for number, (entry, data) in enumerate(pieces):
            if deltas is not None:
                apply(deltas[number], self._published[entry.name])
            elif entry.name in self._published:
                np.copyto(self._published[entry.name], data)
            else:
                self._published[entry.name] = data.copy()


def checksum(arrays: Iterable[np.ndarray]) -> int:
    """XXH3 (64 bits) of the bytes of flat arrays, one after the other."""
    digest = xxhash.xxh3_64()
    for array in arrays:
        digest.update(array.data)
    return digest.intdigest()
