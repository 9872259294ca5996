"""Learner side: a rank's partitions become buckets in the object store. Nothing is gathered."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
import ray
import torch
from torch import Tensor

from pear_ray.weights.manifest import Bucket, Entry


def publish(
    partitions: Iterable[tuple[str, tuple[int, ...], Tensor]], rank: int, bucket_mib: int
) -> list[Bucket]:
    """Copy this rank's partitions (name, full shape, flat tensor) into the object store.

    A bucket is closed when the next partition would make it longer than `bucket_mib`. Its object
    lives as long as this process and its reference do.
    """
    buckets: list[Bucket] = []
    entries: list[Entry] = []
    pieces: list[np.ndarray] = []
    size = 0

    def close() -> None:
        nonlocal size
        flat = np.concatenate(pieces)
        buckets.append(Bucket([ray.put(flat)], rank, zlib.crc32(flat), tuple(entries)))
        entries.clear()
        pieces.clear()
        size = 0

    for name, shape, tensor in partitions:
        # numpy has no bfloat16; bytes have no dtype, and the entry keeps it.
        data = tensor.cpu().contiguous().view(torch.uint8).numpy()
        if pieces and size + data.nbytes > bucket_mib * 2**20:
            close()
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(Entry(name, dtype, shape, size, data.nbytes))
        pieces.append(data)
        size += data.nbytes
    close()
    return buckets
