"""Two small actors between learners and generators: what the newest weights are, and which
rollouts are ready. Both hold references, never payloads, and every wait in them has a deadline."""

from __future__ import annotations

import asyncio
from typing import Any

import ray

from pear_ray.weights.manifest import Bucket, WeightVersion


class Closed(RuntimeError):
    """The other side has gone; the message says why."""


@ray.remote(num_cpus=0)
class Board:
    """Knows the newest weight version. At most two are alive: the newest whole one, and the one
    that ranks are announcing."""

    def __init__(self) -> None:
        self._newest: WeightVersion | None = None
        self._arriving: dict[int, list[Bucket]] = {}
        self._arriving_version = -1
        self._closed: str | None = None
        self._change = asyncio.Condition()

    async def announce(
        self, version: int, rank: int, num_ranks: int, buckets: list[Bucket]
    ) -> None:
        """One rank's share of a version. The version counts once every rank has announced it."""
        async with self._change:
            if version != self._arriving_version:
                self._arriving, self._arriving_version = {}, version
            self._arriving[rank] = buckets
            if len(self._arriving) == num_ranks:
                shares = [bucket for _, share in sorted(self._arriving.items()) for bucket in share]
                self._newest = WeightVersion(version, num_ranks, tuple(shares))
                self._arriving, self._arriving_version = {}, -1
            self._change.notify_all()

    async def newest(self, minimum: int, deadline_seconds: float) -> WeightVersion:
        """The newest version, once it is at least `minimum`.

        Raises:
            TimeoutError: it did not come in time.
            Closed: it will not come any more.
        """

        def ready() -> bool:
            return self._closed is not None or (
                self._newest is not None and self._newest.version >= minimum
            )

        async with self._change:
            try:
                await asyncio.wait_for(self._change.wait_for(ready), deadline_seconds)
            except TimeoutError:
                have = "none" if self._newest is None else str(self._newest.version)
                raise TimeoutError(
                    f"weights version {minimum}: not announced within {deadline_seconds:.0f} s"
                    f" (newest: {have})"
                ) from None
            if self._closed is not None:
                raise Closed(self._closed)
            assert self._newest is not None
            return self._newest

    async def close(self, reason: str) -> None:
        """Wake everyone who waits."""
        async with self._change:
            self._closed = reason
            self._change.notify_all()


@ray.remote(num_cpus=0)
class RolloutQueue:
    """Rollouts by learner step. They stay until a checkpoint has made them unnecessary, so that
    learners which restart get the same ones again."""

    def __init__(self) -> None:
        self._ready: dict[int, Any] = {}
        self._closed: str | None = None
        self._change = asyncio.Condition()

    async def put(self, step: int, reference: list[Any]) -> None:
        """Offer the rollouts of a step, as a reference in a list of one."""
        async with self._change:
            self._ready[step] = reference
            self._change.notify_all()

    async def take(self, step: int, deadline_seconds: float) -> Any:
        """The reference to the rollouts of a step.

        Raises:
            TimeoutError: they did not come in time.
            Closed: they will not come any more.
        """
        async with self._change:
            try:
                await asyncio.wait_for(
                    self._change.wait_for(lambda: self._closed is not None or step in self._ready),
                    deadline_seconds,
                )
            except TimeoutError:
                raise TimeoutError(
                    f"rollouts of step {step}: not ready within {deadline_seconds:.0f} s"
                ) from None
            if step in self._ready:
                return self._ready[step]
            raise Closed(str(self._closed))

    async def forget_before(self, step: int) -> None:
        """Drop what no learner will ask for again."""
        for old in [known for known in self._ready if known < step]:
            del self._ready[old]

    async def close(self, reason: str) -> None:
        """Wake everyone who waits."""
        async with self._change:
            self._closed = reason
            self._change.notify_all()
