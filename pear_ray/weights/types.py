"""The records of a published weight version: buckets in Ray's object store and their contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ParamMeta:
    """One parameter of a bucket. The flat partition of each rank has `num_bytes`.

    ParamMeta("model.norm.weight", "float32", shape=(128,), num_bytes=256)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Bucket:
    """One object of the store: a list with the rank's partition of each of `params`.

    A partition is a flat array of unsigned integers or, with a `base_version`, a `delta.Delta` from the rank's
    partition in that version. `checksum` is the XXH3 (64 bits) of the whole partitions in this version, so a delta
    applied to a wrong base is detected. `may_be_base`: deltas from these partitions may follow.

    `reference` is a list of one, so that Ray does not fetch the bytes with this record.
    """

    reference: list[Any]
    rank: int
    checksum: int
    params: tuple[ParamMeta, ...]
    base_version: int | None = None
    may_be_base: bool = False


@dataclass(frozen=True)
class RankShard:
    """One rank's part of a version; its objects hold `num_bytes` of weights."""

    version: int
    rank: int
    buckets: tuple[Bucket, ...]
    num_bytes: int

    @property
    def base_version(self) -> int | None:
        """Return the version its deltas start from; None if it has no deltas."""
        return base_version(self.buckets)


@dataclass(frozen=True)
class WeightVersion:
    """All buckets of all ranks. Version v is the policy after v optimizer steps."""

    version: int
    num_ranks: int
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, shards: Sequence[RankShard]) -> WeightVersion:
        """Join the shards of all ranks, in the order of ranks."""
        buckets = (bucket for shard in shards for bucket in shard.buckets)
        return cls(shards[0].version, len(shards), tuple(buckets))

    @property
    def base_version(self) -> int | None:
        """Return the version its deltas start from; None if it has no deltas."""
        return base_version(self.buckets)


def base_version(buckets: Sequence[Bucket]) -> int | None:
    """Return the version that the deltas of `buckets` start from; None if all are full."""
    return next((b.base_version for b in buckets if b.base_version is not None), None)
