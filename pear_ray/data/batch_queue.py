"""A small actor between whoever fills steps and the learners."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

# For the answer of an actor that keeps deadlines of its own.
GRACE_SECONDS = 60.0


class QueueClosed(RuntimeError):
    """The other side has gone; the message says why."""


@dataclass(frozen=True)
class QueueState:
    """`name` is another one after a death, when the queue is empty again; steps before
    `first_needed` will not be asked for; `newest_taken` is the latest that was; `is_awaited`: a
    learner waits for a step that is not there."""

    name: str
    first_needed: int
    newest_taken: int | None
    is_awaited: bool


@ray.remote(num_cpus=0)
class BatchQueue:
    """What learners learn from, by step: rollouts, or rows of a corpus. It stays until a checkpoint
    has made it unnecessary, so that learners which restart get the same again. With `max_ahead`,
    whoever fills the queue waits while it is that many steps ahead of the learners."""

    def __init__(self, max_ahead: int | None = None) -> None:
        self._name = uuid.uuid4().hex
        self._ready: dict[int, Any] = {}
        self._first_needed = 0
        self._num_waiting = 0
        self._newest_taken: int | None = None
        self._max_ahead = max_ahead
        self._closed: str | None = None
        self._change = asyncio.Condition()

    async def first_requested(self, timeout_seconds: float) -> int:
        """The first step that a learner asks for.

        Raises:
            TimeoutError: none asked in time.
        """
        async with self._change:
            await self._wait(
                lambda: self._newest_taken is not None, timeout_seconds, "no learner asked"
            )
            assert self._newest_taken is not None
            return self._newest_taken

    async def put(
        self, step: int, reference: list[Any], timeout_seconds: float = GRACE_SECONDS
    ) -> None:
        """Offer what a step learns from, as a reference in a list of one.

        Raises:
            TimeoutError: learners did not come near in time.
            Closed: there are no learners any more.
        """

        def near() -> bool:
            return self._max_ahead is None or step <= (self._newest_taken or 0) + self._max_ahead

        async with self._change:
            await self._wait(near, timeout_seconds, f"step {step}: learners did not come near")
            self._ready[step] = reference
            self._change.notify_all()

    async def take(self, step: int, timeout_seconds: float) -> Any:
        """The reference to what a step learns from.

        Raises:
            TimeoutError: it did not come in time.
            Closed: it will not come any more.
        """
        async with self._change:
            newest = self._newest_taken
            self._newest_taken = step if newest is None else max(newest, step)
            self._change.notify_all()
            self._num_waiting += 1
            try:
                await self._wait(
                    lambda: step in self._ready, timeout_seconds, f"data of step {step}: not ready"
                )
            finally:
                self._num_waiting -= 1
            return self._ready[step]

    async def state(self) -> QueueState:
        """How it stands."""
        is_awaited = self._num_waiting > 0
        return QueueState(self._name, self._first_needed, self._newest_taken, is_awaited)

    async def _wait(self, ready: Callable[[], bool], timeout_seconds: float, what: str) -> None:
        """Until something is ready; also what was ready before the queue was closed counts."""
        try:
            await asyncio.wait_for(
                self._change.wait_for(lambda: ready() or self._closed is not None),
                timeout_seconds,
            )
        except TimeoutError:
            raise TimeoutError(f"{what} within {timeout_seconds:.0f} s") from None
        if not ready():
            raise QueueClosed(str(self._closed))

    async def drop_before(self, step: int) -> None:
        """Drop what no learner will ask for again."""
        self._first_needed = max(step, self._first_needed)
        for old in [known for known in self._ready if known < step]:
            del self._ready[old]

    async def close(self, reason: str) -> None:
        """Wake everyone who waits."""
        async with self._change:
            self._closed = reason
            self._change.notify_all()


def take_batch(queue: Any, step: int, timeout_seconds: float) -> Any:
    """What a step learns from, itself, from a `BatchQueue`."""
    taken = queue.take.remote(step, timeout_seconds)
    (reference,) = ray.get(taken, timeout=timeout_seconds + GRACE_SECONDS)
    return ray.get(reference, timeout=timeout_seconds)
