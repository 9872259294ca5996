"""What a published version of the weights is: buckets in the object store and their contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ParamMeta:
    """One parameter in a bucket: the rank's flat partition is `num_bytes` long, on every rank.

    Entry("model.norm.weight", "float32", shape=(128,), num_bytes=256)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Bucket:
    """One object of the store: a list with one item for each entry, the partition's elements as
    unsigned integers or, where there is a `base_version`, a `delta.Delta` from the rank's elements
    in that version. `checksum` is the XXH3 (64 bits) of the partitions one after the other, whole
    and as they are in this version: a delta on another base does not pass.

    `reference` is a list of one, which keeps Ray from fetching the bytes wherever the manifest is
    sent. `may_be_base`: deltas from these partitions may follow.
    """

    reference: list[Any]
    rank: int
    checksum: int
    entries: tuple[ParamMeta, ...]
    base_version: int | None = None
    may_be_base: bool = False


@dataclass(frozen=True)
class RankShard:
    """What one rank published of a version; its objects hold `num_bytes` of weights."""

    version: int
    rank: int
    buckets: tuple[Bucket, ...]
    num_bytes: int

    @property
    def base_version(self) -> int | None:
        """The version that one must hold to take this share; None: no bucket is a delta."""
        return next((b.base_version for b in self.buckets if b.base_version is not None), None)


@dataclass(frozen=True)
class WeightVersion:
    """All buckets of all ranks: version v is the policy after v optimizer steps."""

    version: int
    num_ranks: int
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, shares: Sequence[RankShard]) -> WeightVersion:
        """What all ranks published of a version, in their order."""
        buckets = (bucket for share in shares for bucket in share.buckets)
        return cls(shares[0].version, len(shares), tuple(buckets))

    @property
    def base_version(self) -> int | None:
        """The version that one must hold to take this one; None: no bucket is a delta."""
        return next((b.base_version for b in self.buckets if b.base_version is not None), None)
