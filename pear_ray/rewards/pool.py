"""Processes that grade completions within a time and memory limit, and a pool of them that never blocks an event loop.

A completion that makes its grader loop, crash, exit or exhaust the memory costs only its own grade, and cannot reach
the network (`deny_network`). The process keeps the user's rights and files, though. That suffices for tasks that treat
completions as data, like `countdown` and `math`. Some tasks of `reasoning_gym` evaluate them as Python (listed in its
docstring): run those, and tasks of your own that execute completions, on a cluster that can reach nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import platform
import resource
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pear_ray.config import Rewards as Settings
from pear_ray.config import TaskSpec
from pear_ray.records import Grade, Problem
from pear_ray.tasks import make_graders

log = logging.getLogger(__name__)

SECONDS_PER_CALL = 1.0  # Calls return after this time, so that a later one must hang in an answer.
ALARM_INTERVAL_SECONDS = 1.0  # Python ignores exceptions raised in a destructor or callback: repeat the alarm.
TOO_LATE = "more than rewards.timeout_seconds = {:g} s"
MAX_ANSWERS_PER_CALL = 1024
CALLS_PER_WORKER = 2  # One call runs while the next one waits at the worker.
GRACE_SECONDS = 5.0  # Slack for Ray on a busy machine, beyond the time of a call and of its last answer.
START_SECONDS = 300.0
MAX_FAILED_STARTS = 3
MAX_DEATHS_ALONE = 2  # Something else may kill a worker while it grades one answer, but hardly twice in a row.

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
# AUDIT_ARCH_*, and the system calls socket and io_uring_setup, which opens sockets too.
MACHINES = {"x86_64": (0xC000003E, 41, 425), "aarch64": (0xC00000B7, 198, 425)}
X32 = 0x40000000  # System calls of the x32 ABI start here.
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16  # Offsets in struct seccomp_data.
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, DENY = 0x7FFF0000, 0x00050000 | errno.EACCES


class GradeTimeout(BaseException):
    """Raised by the alarm. Not an Exception, because graders catch those."""


@ray.remote(num_cpus=0)
class RewardWorker:
    """Grades one answer after another, for all tasks of a job."""

    def __init__(self, specs: Sequence[TaskSpec], settings: Settings) -> None:
        self._tasks = {task.name: task for task in make_graders(specs)}
        self._settings = settings
        self._is_sandboxed = settings.network

        def raise_timeout(number: int, frame: Any) -> None:
            raise GradeTimeout

        signal.signal(signal.SIGALRM, raise_timeout)

    def ready(self) -> list[Grade]:
        """Return no grades, once the tasks are built."""
        return []

    def grade(self, answers: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Return the grades of the first answers: at least one, then for `SECONDS_PER_CALL`."""
        if not self._is_sandboxed:
            # Here and not before: tasks may download data, and only this thread grades.
            deny_network()
            self._is_sandboxed = True
        grades: list[Grade] = []
        began = time.monotonic()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limits = (pages * resource.getpagesize() + self._settings.memory_mib * 2**20, soft, hard)
        lowest = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
        # Of the address space, and only during a call: Ray maps its object store when it first needs it.
        resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))
        try:
            for problem, text in answers:
                grades.append(self._grade(problem, text))
                if time.monotonic() - began > SECONDS_PER_CALL:
                    break
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        return grades

    def _grade(self, problem: Problem, text: str) -> Grade:
        try:
            signal.setitimer(signal.ITIMER_REAL, self._settings.timeout_seconds, ALARM_INTERVAL_SECONDS)
            grade = self._tasks[problem.task].grade(problem, text)
            if not isinstance(grade, Grade):
                raise TypeError(f"grade: expected a Grade, got {type(grade).__name__}")
            if not math.isfinite(grade.reward):
                raise ValueError(f"reward: expected a finite number, got {grade.reward}")
            return grade
        except GradeTimeout:
            return failed_grade(TimeoutError(TOO_LATE.format(self._settings.timeout_seconds)))
        except MemoryError:
            return failed_grade(MemoryError(f"more than rewards.memory_mib = {self._settings.memory_mib} MiB"))
        except BaseException as error:  # of a user's task: anything, SystemExit included
            return failed_grade(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def failed_grade(error: BaseException) -> Grade:
    """Return the grade of an answer that could not be graded: reward 0 and the reason."""
    return Grade(0.0, False, {}, f"not graded: {type(error).__name__}: {error}")


def deny_network() -> bool:
    """Let `socket` raise PermissionError in this thread and in the processes and threads it starts, except for Unix
    sockets. Other threads, Ray's among them, keep the network; open sockets stay usable; a filter cannot be removed.
    Return False, and log a warning, if the system does not support it (Linux seccomp)."""
    if platform.machine() not in MACHINES:
        log.warning("graders keep the network: no filter for %s", platform.machine())
        return False
    machine, socket_number, uring_number = MACHINES[platform.machine()]
    # (operation, jump if true, jump if false, operand); jumps skip that number of instructions.
    instructions = [
        (LOAD, 0, 0, MACHINE),
        (IF_EQUAL, 0, 6, machine),
        (LOAD, 0, 0, NUMBER),
        (IF_AT_LEAST, 4, 0, X32),
        (IF_EQUAL, 3, 0, uring_number),
        (IF_EQUAL, 0, 3, socket_number),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (IF_EQUAL, 1, 0, socket.AF_UNIX),
        (RETURN, 0, 0, DENY),
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in instructions))
    program = struct.pack("HP", len(instructions), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges = libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if no_new_privileges or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):
        reason = errno.errorcode.get(ctypes.get_errno(), "unknown")
        log.warning("graders keep the network: the kernel refused the filter (%s)", reason)
        return False
    return True


@dataclass(eq=False)
class _Group:
    """The answers submitted under one key, and their grades by index."""

    key: Hashable
    answers: Sequence[tuple[Problem, str]]
    grades: dict[int, Grade] = field(default_factory=dict)

    def in_order(self) -> list[Grade]:
        return [self.grades[index] for index in range(len(self.answers))]


@dataclass(eq=False)
class _Batch:
    """The answers of one call, each as its group and its index there, and how many workers died grading them."""

    answers: list[tuple[_Group, int]]
    num_deaths: int = 0


@dataclass(eq=False)
class _Worker:
    """An actor and its open calls, which it runs in order; the first call of a new worker is `ready`, with an empty
    batch. It turned to its first open call at `since`, in `time.monotonic()` seconds."""

    actor: Any
    calls: deque[tuple[Any, _Batch]]
    since: float
    is_ready: bool = False


class RewardPool(AbstractContextManager["RewardPool"]):
    """`settings.processes` reward workers with all tasks of a job, stopped on exit: what waits stays without a grade.
    Answers wait here until a worker has room, then go there in large batches. A worker that hangs or dies is replaced,
    and its unfinished answers are graded again: those of the call it was running one by one, so that only the answer to
    blame gets a `failed_grade`. Methods raise RuntimeError if workers fail to start several times in a row."""

    def __init__(self, specs: Sequence[TaskSpec], settings: Settings) -> None:
        self._specs = tuple(specs)
        self._settings = settings
        self._backlog: deque[tuple[_Group, int]] = deque()
        self._retries: deque[_Batch] = deque()  # to grade again, before the backlog
        self._finished: list[_Group] = []
        self.num_waiting = 0  # answers without a grade
        self._num_failed_starts = 0
        self._workers = [self._start() for _ in range(settings.processes)]

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []

    @property
    def pending_calls(self) -> list[Any]:
        """Return the references to wait for before `pop_finished`."""
        return [reference for worker in self._workers for reference, _ in worker.calls]

    def submit(self, key: Hashable, answers: Sequence[tuple[Problem, str]]) -> _Group:
        """Queue answers without waiting; `pop_finished` returns their grades under `key`."""
        group = _Group(key, answers)
        if not answers:
            self._finished.append(group)
        self._backlog.extend((group, index) for index in range(len(answers)))
        self.num_waiting += len(answers)
        self._dispatch()
        return group

    def pop_finished(self, timeout_seconds: float) -> list[tuple[Hashable, list[Grade]]]:
        """Return each key whose answers are all graded since the last call, with their grades in order. Waits for the
        first one up to `timeout_seconds`, unless no answers wait."""
        deadline = time.monotonic() + timeout_seconds
        self._advance(0.0)
        while not self._finished and self.num_waiting and time.monotonic() < deadline:
            self._advance(deadline - time.monotonic())
        finished, self._finished = self._finished, []
        return [(group.key, group.in_order()) for group in finished]

    def grade(self, answers: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Return the grades of `answers` in order. Waits until all are graded or failed."""
        group = self.submit(None, answers)
        while group not in self._finished:
            self._advance(GRACE_SECONDS)
        self._finished.remove(group)
        return group.in_order()

    def _dispatch(self) -> None:
        """Send batches to workers with room, the least loaded first."""
        while self._retries or self._backlog:
            free = [w for w in self._workers if w.is_ready and len(w.calls) < CALLS_PER_WORKER]
            if not free:
                return
            worker = min(free, key=lambda worker: sum(len(batch.answers) for _, batch in worker.calls))
            if self._retries:
                batch = self._retries.popleft()
            else:
                share = -(-len(self._backlog) // len(self._workers))
                batch = _Batch([self._backlog.popleft() for _ in range(min(share, MAX_ANSWERS_PER_CALL))])
            self._send(worker, batch)

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
                if not worker.is_ready or not isinstance(error, RayTaskError):
                    return self._replace(worker, error)
                self._fail(worker.calls.popleft()[1], error.cause)
            else:
                self._record(worker.calls.popleft()[1], grades)
                if not worker.is_ready:
                    worker.is_ready = True
                    self._num_failed_starts = 0
            worker.since = time.monotonic()
        if self._seconds_left(worker) > 0:
            return worker
        late = TOO_LATE.format(self._settings.timeout_seconds)
        return self._replace(worker, TimeoutError(late if worker.is_ready else f"not ready in {START_SECONDS:.0f} s"))

    def _replace(self, worker: _Worker, error: Exception) -> _Worker:
        """Replace a worker that fails to start, dies or hangs, perhaps through its first call. An answer alone in a
        worker that dies is graded once more, by a new one: whatever killed this one may have killed others that are not
        noticed yet. Raise RuntimeError after several failures to start."""
        _, batch = worker.calls[0]
        alone: _Batch | None = None
        if not worker.is_ready:
            self._num_failed_starts += 1
            if self._num_failed_starts >= MAX_FAILED_STARTS:
                reason = f"rewards: workers failed to start {self._num_failed_starts} times: {error}"
                raise RuntimeError(reason) from error
            alone = worker.calls.pop()[1] if len(worker.calls) > 1 else None
        elif isinstance(error, RayError):
            batch.num_deaths += 1
            if len(batch.answers) == 1 and batch.num_deaths < MAX_DEATHS_ALONE:
                alone = batch
            else:
                self._fail(batch, RuntimeError(f"its worker died {batch.num_deaths} times, grading it alone"))
        else:
            self._fail(batch, error)
        ray.kill(worker.actor)
        worker.calls.popleft()
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
            if len(group.grades) == len(group.answers):
                self._finished.append(group)
        self.num_waiting -= len(grades)
        self._backlog.extendleft(reversed(batch.answers[len(grades) :]))

    def _start(self, alone: _Batch | None = None) -> _Worker:
        """Start a worker, with the batch `alone` as its first one."""
        actor_class = RewardWorker.options(scheduling_strategy="SPREAD")  # type: ignore[attr-defined]
        actor = actor_class.remote(self._specs, self._settings)
        worker = _Worker(actor, deque([(actor.ready.remote(), _Batch([]))]), time.monotonic())
        if alone is not None:
            self._send(worker, alone)
        return worker
