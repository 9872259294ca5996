"""Two small actors: what the newest weights are, and what the next steps learn from. Both hold
references, never payloads; every wait in them has a deadline; and what they know can be told to
them again."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import Literal

import ray

from pear_ray.data.batch_queue import QueueClosed
from pear_ray.weights.types import RankShard, WeightVersion

Wish = Literal["nothing", "again", "full"]


@dataclass(frozen=True)
class PublishedVersions:
    """What the board knows: the newest version, before it the one that it is a change to, if it is
    one; and where the stream of problems stands behind the newest. `mark` differs after each
    announcement."""

    versions: tuple[WeightVersion, ...]
    next_problem: int
    cursor: str


@ray.remote(num_cpus=0)
class PolicyVersions:
    """Knows the newest weight versions. Started again after a death it knows nothing: learners ask
    it what it wishes while they wait, and say again what they have published."""

    def __init__(self) -> None:
        self._announced: PublishedVersions | None = None
        self._arriving: dict[int, RankShard] = {}
        self._arriving_from: tuple[int, int, str] | None = None
        self._wants_full = False
        self._closed: str | None = None
        self._change = asyncio.Condition()

    async def announce(
        self, share: RankShard, num_ranks: int, next_problem: int, attempt: str
    ) -> None:
        """One rank's share of a version, which counts once every rank of the same attempt (name of
        one start of the learners) has announced its own."""
        async with self._change:
            if self._arriving_from != (share.version, num_ranks, attempt):
                self._arriving = {}
            self._arriving_from = (share.version, num_ranks, attempt)
            self._arriving[share.rank] = share
            if len(self._arriving) < num_ranks:
                return
            whole = WeightVersion.of([self._arriving[rank] for rank in range(num_ranks)])
            self._arriving = {}
            known = () if self._announced is None else self._announced.versions
            base = [version for version in known if version.version == whole.base_version]
            self._announced = PublishedVersions((*base, whole), next_problem, uuid.uuid4().hex)
            self._wants_full &= whole.base_version is not None
            self._change.notify_all()

    async def newest(self, cursor: str | None, wait_seconds: float) -> PublishedVersions | None:
        """What there is, once its mark is another; None if it stays as it is for so long.

        Raises:
            Closed: nothing will come any more.
        """

        def ready() -> bool:
            changed = self._announced is not None and self._announced.cursor != cursor
            return changed or self._closed is not None

        async with self._change:
            try:
                await asyncio.wait_for(self._change.wait_for(ready), wait_seconds)
            except TimeoutError:
                return None
            if self._closed is not None:
                raise QueueClosed(self._closed)
            return self._announced

    async def request_full(self) -> None:
        """An engine cannot follow by changes: the next version shall be whole."""
        self._wants_full = True

    async def requested_update(self, version: int) -> Wish:
        """What learners at `version` should publish or say again."""
        newest = -1 if self._announced is None else self._announced.versions[-1].version
        if self._wants_full:
            return "full"
        return "nothing" if newest == version else "again"

    async def close(self, reason: str) -> None:
        """Wake everyone who waits."""
        async with self._change:
            self._closed = reason
            self._change.notify_all()
