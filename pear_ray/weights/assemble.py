"""Generator side: buckets of all ranks become whole tensors again."""

from __future__ import annotations

import math
import time
import zlib

import numpy as np
import ray
import torch
from torch import Tensor

from pear_ray.weights.manifest import WeightVersion


def fetch(version: WeightVersion, deadline_seconds: float) -> dict[str, Tensor]:
    """The parameters of a version by name, whole.

    The store sends each bucket to a node once, however many engines on it ask.

    Raises:
        TimeoutError: the buckets did not all come in time; names version, rank and bucket.
        LookupError: a bucket has gone with the process that published it.
        ValueError: a bucket's bytes are not those that were published.
    """
    end = time.monotonic() + deadline_seconds
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    facts = {}
    for number, bucket in enumerate(version.buckets):
        label = f"weights version {version.version}, rank {bucket.rank}, bucket {number}"
        try:
            flat = ray.get(bucket.reference[0], timeout=max(0.0, end - time.monotonic()))
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(f"{label}: not fetched within {deadline_seconds:.0f} s") from error
        except ray.exceptions.ObjectLostError as error:
            raise LookupError(f"{label}: no longer in the store, its publisher has gone") from error
        if zlib.crc32(flat) != bucket.checksum:
            raise ValueError(f"{label}: checksum differs from the published one")
        for entry in bucket.entries:
            piece = flat[entry.offset : entry.offset + entry.num_bytes]
            parts.setdefault(entry.name, []).append((bucket.rank, piece))
            facts[entry.name] = entry
    tensors = {}
    for name, pieces in parts.items():
        if [rank for rank, _ in sorted(pieces, key=lambda p: p[0])] != list(
            range(version.num_ranks)
        ):
            raise ValueError(f"weights version {version.version}: {name} lacks a rank's partition")
        joined = np.concatenate([piece for _, piece in sorted(pieces, key=lambda p: p[0])])
        entry = facts[name]
        flat_tensor = torch.from_numpy(joined).view(getattr(torch, entry.dtype))
        # Partitions are padded to equal size; what is behind the last element is padding.
        tensors[name] = flat_tensor[: math.prod(entry.shape)].view(entry.shape)
    return tensors
