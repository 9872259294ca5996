"""The actor that knows the newest weight version. It holds references, never weights, and starts without torch."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray

from pear_ray.data.batch_queue import QueueClosed


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

    A partition is a flat array of unsigned integers or, with a `base_version`, a `Delta` from the rank's partition in
    that version. `checksum` is the XXH3 (64 bits) of the whole partitions in this version, so a delta applied to a
    wrong base is detected. `may_be_base`: deltas from these partitions may follow. `reference` is a list of one, so
    that Ray does not fetch the bytes with this record.
    """

    reference: list[Any]
    rank: int
    checksum: int
    params: tuple[ParamMeta, ...]
    base_version: int | None = None
    may_be_base: bool = False


class _Buckets:
    buckets: tuple[Bucket, ...]

    @property
    def base_version(self) -> int | None:
        """Return the version that the deltas start from; None if all buckets are full."""
        return next((bucket.base_version for bucket in self.buckets if bucket.base_version is not None), None)


@dataclass(frozen=True)
class RankShard(_Buckets):
    """One rank's part of a version; its objects hold `num_bytes` of weights."""

    version: int
    rank: int
    buckets: tuple[Bucket, ...]
    num_bytes: int


@dataclass(frozen=True)
class WeightVersion(_Buckets):
    """All buckets of all ranks. Version v is the policy after v optimizer steps."""

    version: int
    num_ranks: int
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, shards: Sequence[RankShard]) -> WeightVersion:
        """Join the shards of all ranks, in the order of ranks."""
        return cls(shards[0].version, len(shards), tuple(bucket for shard in shards for bucket in shard.buckets))


@dataclass(frozen=True)
class PublishedVersions:
    """The newest version, after its base version if it has deltas.

    `next_problem`: position in the problem stream after that version's step. `cursor` changes with each announcement.
    """

    versions: tuple[WeightVersion, ...]
    next_problem: int
    cursor: str


@ray.remote(num_cpus=0)
class PolicyVersions:
    """Registry of the newest version. Learners poll `requested_update`, and announce theirs again after a restart."""

    def __init__(self) -> None:
        self._published: PublishedVersions | None = None
        # Shards by rank of a version that is not complete, under its (version, number of ranks, attempt).
        self._shards: dict[tuple[int, int, str], dict[int, RankShard]] = {}
        self._needs_full = False
        self._closed: str | None = None
        self._changed = asyncio.Condition()

    async def announce(self, shard: RankShard, num_ranks: int, next_problem: int, attempt: str) -> None:
        """Add one rank's shard; a version counts once all ranks of an `attempt` (start of learners) announced it."""
        async with self._changed:
            key = shard.version, num_ranks, attempt
            shards = self._shards.get(key, {}) | {shard.rank: shard}
            self._shards = {key: shards}
            if len(shards) < num_ranks:
                return
            self._shards = {}
            newest = WeightVersion.of([shards[rank] for rank in range(num_ranks)])
            known = self._published.versions if self._published else ()
            base = [version for version in known if version.version == newest.base_version]
            self._published = PublishedVersions((*base, newest), next_problem, uuid.uuid4().hex)
            self._needs_full &= newest.base_version is not None
            self._changed.notify_all()

    async def newest(self, cursor: str | None, wait_seconds: float) -> PublishedVersions | None:
        """Wait for a cursor other than `cursor`; None after `wait_seconds`. QueueClosed if the learners have ended."""

        def ready() -> bool:
            return self._closed is not None or (self._published is not None and self._published.cursor != cursor)

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(ready), wait_seconds)
            except TimeoutError:
                return None
            if self._closed is not None:
                raise QueueClosed(self._closed)
            return self._published

    async def request_full(self) -> None:
        """Request a full version from the learners, for an engine that cannot apply deltas."""
        self._needs_full = True

    async def requested_update(self, version: int) -> Literal["none", "announce", "full"]:
        """Return the update that learners at `version` must publish or announce again."""
        if self._needs_full:
            return "full"
        newest = self._published.versions[-1].version if self._published else -1
        return "none" if newest == version else "announce"

    async def close(self, reason: str) -> None:
        """End all waits of `newest` with QueueClosed."""
        async with self._changed:
            self._closed = reason
            self._changed.notify_all()
