"""What a published version of the weights is: buckets in the object store and their contents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One parameter's share in a bucket: the rank's flat partition, `num_bytes` from `offset`.

    Entry("model.norm.weight", "float32", shape=(128,), offset=0, num_bytes=256)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Bucket:
    """One object of the store: flat bytes, whose CRC-32 is `checksum`. `reference` is a list of
    one, which keeps Ray from fetching the bytes wherever the manifest is sent."""

    reference: list[Any]
    rank: int
    checksum: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class WeightVersion:
    """All buckets of all ranks: version v is the policy after v optimiser steps."""

    version: int
    num_ranks: int
    buckets: tuple[Bucket, ...]
