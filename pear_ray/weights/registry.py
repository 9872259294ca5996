"""The actor that knows the newest weight version. It holds references, never weights."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import Literal

import ray

from pear_ray.data.batch_queue import QueueClosed
from pear_ray.weights.publish import RankShard, WeightVersion


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
