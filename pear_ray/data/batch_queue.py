"""A queue of training batches between their producer (driver) and the learners, as a Ray actor."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

# Extra time for the reply of an actor call that has a timeout of its own.
GRACE_SECONDS = 60.0


class QueueClosed(RuntimeError):
    """The other side is gone; the message is the reason."""


@dataclass(frozen=True)
class QueueState:
    """A snapshot of the queue. `name` is unique to one life of the actor: after a restart it differs and the queue is
    empty. Steps before `first_needed` will not be requested again; `newest_taken` is the latest requested step;
    `is_awaited` is True while a learner waits for a batch."""

    name: str
    first_needed: int
    newest_taken: int | None
    is_awaited: bool


@ray.remote(num_cpus=0)
class BatchQueue:
    """Training batches by step: rollouts, or rows of a corpus. A batch stays until a checkpoint makes it obsolete, so
    that restarted learners get the same one again. With `max_ahead`, `put` blocks while it is that many steps ahead of
    the learners."""

    def __init__(self, max_ahead: float = math.inf) -> None:
        self._name = uuid.uuid4().hex
        self._batches: dict[int, Any] = {}
        self._first_needed = 0
        self._newest_taken: int | None = None
        self._num_waiting = 0
        self._max_ahead = max_ahead
        self._close_reason: str | None = None
        self._changed = asyncio.Condition()

    async def first_requested(self, timeout_seconds: float) -> int:
        """Return the first step that a learner requests; raise TimeoutError if none does."""
        async with self._changed:
            await self._wait(lambda: self._newest_taken is not None, timeout_seconds, "a learner's first request")
            assert self._newest_taken is not None
            return self._newest_taken

    async def put(self, step: int, reference: list[Any], timeout_seconds: float = GRACE_SECONDS) -> None:
        """Add a step's batch, as a reference in a list of one (Ray would resolve a bare one). Raise TimeoutError if the
        learners stay too far behind, QueueClosed if none is left."""
        async with self._changed:
            awaited = f"learners near step {step}"
            await self._wait(lambda: step <= (self._newest_taken or 0) + self._max_ahead, timeout_seconds, awaited)
            self._batches[step] = reference
            self._changed.notify_all()

    async def take(self, step: int, timeout_seconds: float) -> Any:
        """Return the reference to a step's batch, in a list of one. Raise TimeoutError if it does not arrive in time,
        QueueClosed if it never will."""
        async with self._changed:
            self._newest_taken = max(step, self._newest_taken or 0)
            self._changed.notify_all()
            self._num_waiting += 1
            try:
                await self._wait(lambda: step in self._batches, timeout_seconds, f"the batch of step {step}")
            finally:
                self._num_waiting -= 1
            return self._batches[step]

    async def state(self) -> QueueState:
        """Return a snapshot."""
        return QueueState(self._name, self._first_needed, self._newest_taken, is_awaited=self._num_waiting > 0)

    async def drop_before(self, step: int) -> None:
        """Drop batches that no learner will request again."""
        self._first_needed = max(step, self._first_needed)
        self._batches = {known: batch for known, batch in self._batches.items() if known >= step}

    async def close(self, reason: str) -> None:
        """Wake all waiters; those without a result raise QueueClosed."""
        async with self._changed:
            self._close_reason = reason
            self._changed.notify_all()

    async def _wait(self, is_ready: Callable[[], bool], timeout_seconds: float, awaited: str) -> None:
        """Wait for a condition; one that already holds wins over a closed queue."""
        try:
            ended = self._changed.wait_for(lambda: is_ready() or self._close_reason is not None)
            await asyncio.wait_for(ended, timeout_seconds)
        except TimeoutError:
            raise TimeoutError(f"waited {timeout_seconds:.0f} s for {awaited}") from None
        if not is_ready():
            raise QueueClosed(str(self._close_reason))


def take_batch(queue: Any, step: int, timeout_seconds: float) -> Any:
    """Return a step's batch from a `BatchQueue` actor."""
    (reference,) = ray.get(queue.take.remote(step, timeout_seconds), timeout=timeout_seconds + GRACE_SECONDS)
    return ray.get(reference, timeout=timeout_seconds)
