"""Two small actors: what the newest weights are, and what the next steps learn from. Both hold
references, never payloads, and every wait in them has a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ray

from pear_ray.weights.manifest import Bucket, WeightVersion

# For the answer of an actor that keeps deadlines of its own.
GRACE_SECONDS = 60.0


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
class StepQueue:
    """What learners learn from, by step: rollouts, or rows of a corpus. It stays until a checkpoint
    has made it unnecessary, so that learners which restart get the same again. With `max_ahead`,
    whoever fills the queue waits while it is that many steps ahead of the learners."""

    def __init__(self, max_ahead: int | None = None) -> None:
        self._ready: dict[int, Any] = {}
        self._newest_taken: int | None = None
        self._max_ahead = max_ahead
        self._closed: str | None = None
        self._change = asyncio.Condition()

    async def first_wanted(self, deadline_seconds: float) -> int:
        """The first step that a learner asks for.

        Raises:
            TimeoutError: none asked in time.
        """
        async with self._change:
            await self._wait(
                lambda: self._newest_taken is not None, deadline_seconds, "no learner asked"
            )
            assert self._newest_taken is not None
            return self._newest_taken

    async def put(
        self, step: int, reference: list[Any], deadline_seconds: float = GRACE_SECONDS
    ) -> None:
        """Offer what a step learns from, as a reference in a list of one.

        Raises:
            TimeoutError: learners did not come near in time.
            Closed: there are no learners any more.
        """

        def near() -> bool:
            return self._max_ahead is None or step <= (self._newest_taken or 0) + self._max_ahead

        async with self._change:
            await self._wait(near, deadline_seconds, f"step {step}: learners did not come near")
            self._ready[step] = reference
            self._change.notify_all()

    async def take(self, step: int, deadline_seconds: float) -> Any:
        """The reference to what a step learns from.

        Raises:
            TimeoutError: it did not come in time.
            Closed: it will not come any more.
        """
        async with self._change:
            newest = self._newest_taken
            self._newest_taken = step if newest is None else max(newest, step)
            self._change.notify_all()
            await self._wait(
                lambda: step in self._ready, deadline_seconds, f"data of step {step}: not ready"
            )
            return self._ready[step]

    async def _wait(self, ready: Callable[[], bool], deadline_seconds: float, what: str) -> None:
        """Until something is ready; also what was ready before the queue was closed counts."""
        try:
            await asyncio.wait_for(
                self._change.wait_for(lambda: ready() or self._closed is not None),
                deadline_seconds,
            )
        except TimeoutError:
            raise TimeoutError(f"{what} within {deadline_seconds:.0f} s") from None
        if not ready():
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


def take(queue: Any, step: int, deadline_seconds: float) -> Any:
    """What a step learns from, itself, from a `StepQueue`."""
    taken = queue.take.remote(step, deadline_seconds)
    (reference,) = ray.get(taken, timeout=deadline_seconds + GRACE_SECONDS)
    return ray.get(reference, timeout=deadline_seconds)
