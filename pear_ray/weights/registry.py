"""The actor that knows the newest weight version. It holds references, never weights."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import Literal

import ray

from pear_ray.data.batch_queue import QueueClosed
from pear_ray.weights.types import RankShard, WeightVersion

UpdateRequest = Literal["none", "announce", "full"]


@dataclass(frozen=True)
class PublishedVersions:
    """The newest version, after its base version if it has deltas.

    `next_problem` is the position in the problem stream after that version's step; `cursor` changes with each
    announcement.
    """

    versions: tuple[WeightVersion, ...]
    next_problem: int
    cursor: str


@ray.remote(num_cpus=0)
class PolicyVersions:
    """Registry of the newest weight version, empty after a restart.

    While waiting, learners poll `requested_update` and announce their latest version again.
    """

    def __init__(self) -> None:
        self._published: PublishedVersions | None = None
        # Shards of a version that is not complete, and its (version, number of ranks, attempt).
        self._shards: dict[int, RankShard] = {}
        self._shards_of: tuple[int, int, str] | None = None
        self._needs_full = False
        self._closed: str | None = None
        self._changed = asyncio.Condition()

    async def announce(self, shard: RankShard, num_ranks: int, next_problem: int, attempt: str) -> None:
        """Add one rank's shard. A version counts once all ranks of one attempt announced it.

        `attempt` names one start of the learners.
        """
        async with self._changed:
            if self._shards_of != (shard.version, num_ranks, attempt):
                self._shards = {}
            self._shards_of = (shard.version, num_ranks, attempt)
            self._shards[shard.rank] = shard
            if len(self._shards) < num_ranks:
                return
            newest = WeightVersion.of([self._shards[rank] for rank in range(num_ranks)])
            self._shards = {}
            known = () if self._published is None else self._published.versions
            base = [version for version in known if version.version == newest.base_version]
            self._published = PublishedVersions((*base, newest), next_problem, uuid.uuid4().hex)
            self._needs_full &= newest.base_version is not None
            self._changed.notify_all()

    async def newest(self, cursor: str | None, wait_seconds: float) -> PublishedVersions | None:
        """Wait for a cursor other than `cursor`; return None after `wait_seconds`.

        Raises:
            QueueClosed: the learners have ended.
        """

        def ready() -> bool:
            is_new = self._published is not None and self._published.cursor != cursor
            return is_new or self._closed is not None

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

    async def requested_update(self, version: int) -> UpdateRequest:
        """Return the update that learners at `version` must publish or announce again."""
        newest = -1 if self._published is None else self._published.versions[-1].version
        if self._needs_full:
            return "full"
        return "none" if newest == version else "announce"

    async def close(self, reason: str) -> None:
        """End all waits of `newest` with QueueClosed."""
        async with self._changed:
            self._closed = reason
            self._changed.notify_all()
