"""A pool of processes that judge answers, for an event loop that must not wait for any of them."""

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
from pear_ray.rewards.worker import SECONDS_PER_CALL, RewardWorker, failed_grade, late

MAX_ANSWERS_PER_CALL = 1024
# One call is judged while the next one travels.
CALLS_PER_PROCESS = 2
# Beyond the time of a call and of its last verdict: for Ray, on a machine with other work.
GRACE_SECONDS = 5.0
START_SECONDS = 300.0
MAX_FAILED_STARTS = 3
# A process can be killed from outside while it judges one answer alone; hardly twice.
MAX_DEATHS_ALONE = 2


@dataclass(eq=False)
class _Order:
    """What was submitted under one key, and its verdicts so far."""

    key: Hashable
    answers: Sequence[tuple[Problem, str]]
    grades: list[Grade | None]
    num_missing: int


# One answer: an order and the place in it.
_Item = tuple[_Order, int]


@dataclass(eq=False)
class _Call:
    """Answers that are judged together, and how often a process died over them."""

    items: list[_Item]
    num_deaths: int = 0


@dataclass(eq=False)
class _Process:
    """One actor with its calls, which it works on in order; `began` is when it turned to the first
    of them, in `time.monotonic()` seconds, or to starting. `alone` is its first call, where that
    was chosen for it."""

    actor: Any
    starting: Any
    alone: _Call | None
    began: float
    calls: deque[tuple[Any, _Call]] = field(default_factory=deque)

    @property
    def references(self) -> list[Any]:
        """What can become ready next."""
        calls = [reference for reference, _ in self.calls]
        return calls if self.starting is None else [self.starting]

    @property
    def num_waiting(self) -> int:
        return sum(len(call.items) for _, call in self.calls)


class RewardPool(AbstractContextManager["RewardPool"]):
    """`settings.processes` processes with all tasks of a job, ended with the block.

    Answers wait here until a process has room, and then go there many at once: the more of them
    wait, the more in one call. An answer that is late is cut off in its process, or, where that
    does not listen, with it. A process that is late or dies is replaced, and what it had not
    finished is judged again: the answers of the call it was working on one by one, so that only
    the one to blame goes without a verdict (`failed_grade`, with the reason in the note).

        with Verifiers(job.tasks, job.rewards) as verifiers:
            verifiers.submit("group-17", [(problem, text) for text in texts])
            ...
            for key, verdicts in verifiers.finished(timeout_seconds=0.0):
                ...

    Every method but `close` raises RuntimeError when processes fail to start again and again.
    """

    def __init__(self, specs: Sequence[TaskSpec], settings: Settings) -> None:
        self._specs = tuple(specs)
        self._settings = settings
        self._fresh: deque[_Item] = deque()
        self._again: deque[_Call] = deque()
        self._done: deque[_Order] = deque()
        self._num_waiting = 0
        self._num_failed_starts = 0
        self._processes = [self._start() for _ in range(settings.processes)]

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def calls(self) -> list[Any]:
        """References to calls, at whose end `finished` may have something new to say."""
        return [reference for process in self._processes for reference in process.references]

    @property
    def num_waiting(self) -> int:
        """Answers without a verdict."""
        return self._num_waiting

    def submit(self, key: Hashable, answers: Sequence[tuple[Problem, str]]) -> None:
        """Have answers judged; `finished` will name them by the key. Does not wait."""
        self._accept(key, answers)
        self._hand_out()

    def finished(self, timeout_seconds: float) -> list[tuple[Hashable, list[Grade]]]:
        """Keys whose answers have all been judged, each once, with the verdicts in the order of
        the answers. What is ready comes at once; where nothing is, what comes first within
        `timeout_seconds`. Empty where nothing came, or nothing waits."""
        deadline = time.monotonic() + timeout_seconds
        self._advance(0.0)
        while not self._done and self._num_waiting and time.monotonic() < deadline:
            self._advance(deadline - time.monotonic())
        ready = [(order.key, _verdicts_of(order)) for order in self._done]
        self._done.clear()
        return ready

    def grade(self, answers: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """A verdict for each (problem, answer), in order. Waits for them: every answer has its
        time, and every process its time to start."""
        order = self._accept(None, answers)
        while order.num_missing:
            self._advance(GRACE_SECONDS)
        self._done.remove(order)
        return _verdicts_of(order)

    def close(self) -> None:
        """End the processes; what still waits gets no verdict."""
        for process in self._processes:
            ray.kill(process.actor)
        self._processes = []

    def _accept(self, key: Hashable, answers: Sequence[tuple[Problem, str]]) -> _Order:
        order = _Order(key, answers, [None] * len(answers), len(answers))
        self._fresh.extend((order, place) for place in range(len(answers)))
        self._num_waiting += len(answers)
        if not answers:
            self._done.append(order)
        return order

    def _hand_out(self) -> None:
        """Give answers to processes that have room, the one with the fewest first."""
        while self._again or self._fresh:
            free = [
                process
                for process in self._processes
                if process.starting is None and len(process.calls) < CALLS_PER_PROCESS
            ]
            if not free:
                return
            process = min(free, key=lambda process: process.num_waiting)
            self._give(process, self._again.popleft() if self._again else _Call(self._next_items()))

    def _give(self, process: _Process, call: _Call) -> None:
        answers = [order.answers[place] for order, place in call.items]
        if not process.calls:
            process.began = time.monotonic()
        process.calls.append((process.actor.grade.remote(answers), call))

    def _next_items(self) -> list[_Item]:
        share = -(-len(self._fresh) // len(self._processes))
        return [self._fresh.popleft() for _ in range(min(share, MAX_ANSWERS_PER_CALL))]

    def _advance(self, timeout_seconds: float) -> None:
        """Take in all that has come; where nothing has, wait for it. Replaces processes that are
        late or gone."""
        references = [r for process in self._processes for r in process.references]
        if references:
            ready = set(ray.wait(references, num_returns=len(references), timeout=0)[0])
            if not ready and timeout_seconds > 0:
                left = min(map(self._seconds_left, self._processes))
                timeout = max(0.0, min(timeout_seconds, left))
                ready = set(ray.wait(references, num_returns=1, timeout=timeout)[0])
            self._processes = [self._take_in(process, ready) for process in self._processes]
        self._hand_out()

    def _seconds_left(self, process: _Process) -> float:
        """Until a process is late with what it does just now."""
        if process.starting is not None:
            limit = START_SECONDS
        elif process.calls:
            limit = self._settings.timeout_seconds + SECONDS_PER_CALL + GRACE_SECONDS
        else:
            return float("inf")
        return process.began + limit - time.monotonic()

    def _take_in(self, process: _Process, ready: set[Any]) -> _Process:
        """What came from a process; returns it, or what replaces it."""
        if process.starting is not None:
            return self._take_start(process, ready)
        while process.calls and process.calls[0][0] in ready:
            reference, call = process.calls[0]
            try:
                grades = ray.get(reference, timeout=GRACE_SECONDS)
            except RayTaskError as error:
                process.calls.popleft()
                self._fail(call, error.cause)
            except RayError:
                return self._replace_dead(process)
            else:
                process.calls.popleft()
                self._settle(call, grades)
            process.began = time.monotonic()
        return process if self._seconds_left(process) > 0 else self._replace_late(process)

    def _take_start(self, process: _Process, ready: set[Any]) -> _Process:
        reason: Exception = TimeoutError(f"not ready after {START_SECONDS:.0f} s")
        if process.starting in ready:
            try:
                ray.get(process.starting, timeout=GRACE_SECONDS)
            except RayError as error:
                reason = error
            else:
                process.starting = None
                self._num_failed_starts = 0
                if process.alone is not None:
                    self._give(process, process.alone)
                return process
        elif self._seconds_left(process) > 0:
            return process
        self._num_failed_starts += 1
        if self._num_failed_starts >= MAX_FAILED_STARTS:
            raise RuntimeError(
                f"rewards: processes failed to start {self._num_failed_starts} times: {reason}"
            ) from reason
        return self._replace(process, process.alone)

    def _replace_late(self, process: _Process) -> _Process:
        """Its first call hangs, for it has had time for any that does not."""
        _, suspect = process.calls.popleft()
        self._fail(suspect, late(self._settings))
        return self._replace(process)

    def _replace_dead(self, process: _Process) -> _Process:
        """Its first call may have killed it. An answer that was alone in it is tried once more, by
        a process that starts now: what killed this one may have killed others unnoticed."""
        _, suspect = process.calls.popleft()
        suspect.num_deaths += 1
        if len(suspect.items) == 1 and suspect.num_deaths < MAX_DEATHS_ALONE:
            return self._replace(process, suspect)
        reason = f"its process ended {suspect.num_deaths} times, judging it alone"
        self._fail(suspect, RuntimeError(reason))
        return self._replace(process)

    def _replace(self, process: _Process, alone: _Call | None = None) -> _Process:
        ray.kill(process.actor)
        self._again.extendleft(call for _, call in reversed(process.calls))
        return self._start(alone)

    def _fail(self, call: _Call, reason: BaseException) -> None:
        """Have the answers of a call judged one by one; an answer that was alone gets no
        verdict."""
        if len(call.items) > 1:
            self._again.extend(_Call([item]) for item in call.items)
        else:
            self._settle(call, [failed_grade(reason)])

    def _settle(self, call: _Call, grades: Sequence[Grade]) -> None:
        """Note the verdicts on the first answers of a call; the others wait again."""
        for (order, place), grade in zip(call.items, grades, strict=False):
            order.grades[place] = grade
            order.num_missing -= 1
            if not order.num_missing:
                self._done.append(order)
        self._num_waiting -= len(grades)
        self._fresh.extendleft(reversed(call.items[len(grades) :]))

    def _start(self, alone: _Call | None = None) -> _Process:
        actor = RewardWorker.options(scheduling_strategy="SPREAD").remote(  # type: ignore[attr-defined]
            self._specs, self._settings
        )
        return _Process(actor, actor.ready.remote(), alone, time.monotonic())


def _verdicts_of(order: _Order) -> list[Grade]:
    return [grade for grade in order.grades if grade is not None]
