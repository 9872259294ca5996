"""A pool of processes that grade completions, for an event loop that must not block."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pear_ray.config import Rewards as Settings
from pear_ray.config import TaskSpec
from pear_ray.records import Grade, Problem
from pear_ray.rewards.worker import SECONDS_PER_CALL, RewardWorker, failed_grade, timeout_error

MAX_ANSWERS_PER_CALL = 1024
# One call runs while the next one waits at the worker.
CALLS_PER_WORKER = 2
# Slack for Ray on a busy machine, beyond the time of a call and of its last answer.
GRACE_SECONDS = 5.0
START_SECONDS = 300.0
MAX_FAILED_STARTS = 3
# Something else may kill a worker while it grades one answer, but hardly twice in a row.
MAX_DEATHS_ALONE = 2


@dataclass(eq=False)
class _Group:
    """The answers submitted under one key, and their grades by index."""

    key: Hashable
    answers: Sequence[tuple[Problem, str]]
    grades: dict[int, Grade] = field(default_factory=dict)

    @property
    def is_graded(self) -> bool:
        return len(self.grades) == len(self.answers)

    def in_order(self) -> list[Grade]:
        return [self.grades[index] for index in range(len(self.answers))]


# An answer: its group and its index there.
_Answer = tuple[_Group, int]


@dataclass(eq=False)
class _Batch:
    """The answers of one call, and how many workers died grading them."""

    answers: list[_Answer]
    num_deaths: int = 0


@dataclass(eq=False)
class _Worker:
    """An actor and its open calls, which it runs in order.

    The first call of a new worker is `ready`, with an empty batch. `since` is when the worker turned to its first open
    call, in `time.monotonic()` seconds.
    """

    actor: Any
    calls: deque[tuple[Any, _Batch]]
    since: float
    is_ready: bool = False

    @property
    def num_answers(self) -> int:
        return sum(len(batch.answers) for _, batch in self.calls)


class RewardPool(AbstractContextManager["RewardPool"]):
    """`settings.processes` reward workers with all tasks of a job, stopped on exit.

    Answers wait here until a worker has room, then go there in large batches. A worker that hangs or dies is replaced,
    and its unfinished answers are graded again: those of the call it was running one by one, so that only the answer to
    blame gets a `failed_grade`.

        with RewardPool(job.tasks, job.rewards) as pool:
            pool.submit("group-17", [(problem, text) for text in texts])
            ...
            for key, grades in pool.pop_finished(timeout_seconds=0.0):
                ...

    Methods other than `close` raise RuntimeError if workers fail to start several times in a row.
    """

    def __init__(self, specs: Sequence[TaskSpec], settings: Settings) -> None:
        self._specs = tuple(specs)
        self._settings = settings
        self._backlog: deque[_Answer] = deque()
        # Batches to grade again, before the backlog.
        self._retries: deque[_Batch] = deque()
        self._finished: deque[_Group] = deque()
        self._num_waiting = 0
        self._num_failed_starts = 0
        self._workers = [self._start() for _ in range(settings.processes)]

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def pending_calls(self) -> list[Any]:
        """Return the references to wait for before `pop_finished`."""
        return [reference for worker in self._workers for reference, _ in worker.calls]

    @property
    def num_waiting(self) -> int:
        """Return the number of answers without a grade."""
        return self._num_waiting

    def submit(self, key: Hashable, answers: Sequence[tuple[Problem, str]]) -> None:
        """Queue answers without waiting; `pop_finished` returns their grades under `key`."""
        self._add(key, answers)

    def pop_finished(self, timeout_seconds: float) -> list[tuple[Hashable, list[Grade]]]:
        """Return each key whose answers are all graded since the last call, grades in their order.

        Waits for the first key up to `timeout_seconds`, unless no answers wait.
        """
        deadline = time.monotonic() + timeout_seconds
        self._advance(0.0)
        while not self._finished and self._num_waiting and time.monotonic() < deadline:
            self._advance(deadline - time.monotonic())
        finished = [(group.key, group.in_order()) for group in self._finished]
        self._finished.clear()
        return finished

    def grade(self, answers: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Return the grades of `answers` in order. Waits until all are graded or failed."""
        group = self._add(None, answers)
        while not group.is_graded:
            self._advance(GRACE_SECONDS)
        self._finished.remove(group)
        return group.in_order()

    def close(self) -> None:
        """Stop the workers; waiting answers stay without a grade."""
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []

    def _add(self, key: Hashable, answers: Sequence[tuple[Problem, str]]) -> _Group:
        group = _Group(key, answers)
        if group.is_graded:
            self._finished.append(group)
        self._backlog.extend((group, index) for index in range(len(answers)))
        self._num_waiting += len(answers)
        self._dispatch()
        return group

    def _dispatch(self) -> None:
        """Send batches to workers with room, the least loaded first."""
        while self._retries or self._backlog:
            free = [w for w in self._workers if w.is_ready and len(w.calls) < CALLS_PER_WORKER]
            if not free:
                return
            worker = min(free, key=lambda worker: worker.num_answers)
            self._send(worker, self._retries.popleft() if self._retries else self._next_batch())

    def _next_batch(self) -> _Batch:
        share = -(-len(self._backlog) // len(self._workers))
        return _Batch([self._backlog.popleft() for _ in range(min(share, MAX_ANSWERS_PER_CALL))])

    def _send(self, worker: _Worker, batch: _Batch) -> None:
        answers = [group.answers[index] for group, index in batch.answers]
        if not worker.calls:
            worker.since = time.monotonic()
        worker.calls.append((worker.actor.grade.remote(answers), batch))

    def _advance(self, timeout_seconds: float) -> None:
        """Collect finished calls, waiting for the first; replace workers that are late or dead."""
        calls = self.pending_calls
        if calls:
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
            if not ready and timeout_seconds > 0:
                seconds_left = min(timeout_seconds, *map(self._seconds_left, self._workers))
                ready, _ = ray.wait(calls, num_returns=1, timeout=max(0.0, seconds_left))
            done = set(ready)
            self._workers = [self._collect(worker, done) for worker in self._workers]
        self._dispatch()

    def _seconds_left(self, worker: _Worker) -> float:
        """Return the time until the first open call of a worker is late."""
        if not worker.calls:
            return float("inf")
        limit = self._settings.timeout_seconds + SECONDS_PER_CALL + GRACE_SECONDS
        return worker.since + (limit if worker.is_ready else START_SECONDS) - time.monotonic()

    def _collect(self, worker: _Worker, done: set[Any]) -> _Worker:
        """Collect the results of a worker's finished calls; return it or its replacement."""
        while worker.calls and worker.calls[0][0] in done:
            try:
                grades = ray.get(worker.calls[0][0], timeout=GRACE_SECONDS)
            except RayError as error:
                if not worker.is_ready:
                    return self._retry_start(worker, error)
                if not isinstance(error, RayTaskError):
                    return self._replace_dead(worker)
                self._fail(worker.calls.popleft()[1], error.cause)
            else:
                self._record(worker.calls.popleft()[1], grades)
                if not worker.is_ready:
                    worker.is_ready = True
                    self._num_failed_starts = 0
            worker.since = time.monotonic()
        if self._seconds_left(worker) > 0:
            return worker
        if not worker.is_ready:
            return self._retry_start(worker, TimeoutError(f"not ready in {START_SECONDS:.0f} s"))
        self._fail(worker.calls.popleft()[1], timeout_error(self._settings))
        return self._replace(worker)

    def _retry_start(self, worker: _Worker, error: Exception) -> _Worker:
        """Start a worker again, with the batch meant for it alone; raise after several failures."""
        self._num_failed_starts += 1
        if self._num_failed_starts >= MAX_FAILED_STARTS:
            raise RuntimeError(f"rewards: workers failed to start {self._num_failed_starts} times: {error}") from error
        worker.calls.popleft()
        return self._replace(worker, worker.calls.popleft()[1] if worker.calls else None)

    def _replace_dead(self, worker: _Worker) -> _Worker:
        """Replace a worker that died, perhaps through its first call.

        An answer that was alone in it is graded once more, by a new worker: whatever killed this one may have killed
        others that are not noticed yet.
        """
        _, batch = worker.calls.popleft()
        batch.num_deaths += 1
        if len(batch.answers) == 1 and batch.num_deaths < MAX_DEATHS_ALONE:
            return self._replace(worker, batch)
        self._fail(batch, RuntimeError(f"its worker died {batch.num_deaths} times, grading it alone"))
        return self._replace(worker)

    def _replace(self, worker: _Worker, alone: _Batch | None = None) -> _Worker:
        ray.kill(worker.actor)
        self._retries.extendleft(batch for _, batch in reversed(worker.calls))
        return self._start(alone)

    def _fail(self, batch: _Batch, error: BaseException) -> None:
        """Grade the answers of a batch again one by one; fail an answer that was alone."""
        if len(batch.answers) == 1:
            self._record(batch, [failed_grade(error)])
        else:
            self._retries.extend(_Batch([answer]) for answer in batch.answers)

    def _record(self, batch: _Batch, grades: Sequence[Grade]) -> None:
        """Record the grades of the first answers of a batch; requeue the others."""
        for (group, index), grade in zip(batch.answers, grades, strict=False):
            group.grades[index] = grade
            if group.is_graded:
                self._finished.append(group)
        self._num_waiting -= len(grades)
        self._backlog.extendleft(reversed(batch.answers[len(grades) :]))

    def _start(self, alone: _Batch | None = None) -> _Worker:
        """Start a worker, with the batch `alone` as its first one."""
        actor = RewardWorker.options(scheduling_strategy="SPREAD").remote(  # type: ignore[attr-defined]
            self._specs, self._settings
        )
        worker = _Worker(actor, deque([(actor.ready.remote(), _Batch([]))]), time.monotonic())
        if alone is not None:
            self._send(worker, alone)
        return worker
