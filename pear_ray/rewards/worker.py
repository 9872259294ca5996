"""A process that grades completions, each within a time and memory limit.

A completion that makes its grader loop, crash, exit or exhaust the memory costs only its own grade, and cannot reach
the network (`sandbox`). The process keeps the user's rights and files, though. That suffices for tasks that treat
completions as data, like `countdown` and `math`. Some tasks of `reasoning_gym` evaluate them as Python (listed in its
docstring): run those, and tasks of your own that execute completions, on a cluster from which nothing else can be
reached.
"""

from __future__ import annotations

import math
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from pear_ray.config import Rewards as Settings
from pear_ray.config import TaskSpec
from pear_ray.records import Grade, Problem
from pear_ray.rewards.sandbox import deny_network
from pear_ray.tasks import make_graders

# Calls return after this time, so that a later one must hang in an answer.
SECONDS_PER_CALL = 1.0
# Python ignores exceptions raised in a destructor or callback: repeat the alarm.
ALARM_INTERVAL_SECONDS = 1.0


class GradeTimeout(BaseException):
    """Raised by the alarm. Not an Exception, because graders catch those."""


@ray.remote(num_cpus=0)
class RewardWorker:
    """Grades one answer after another, for all tasks of a job."""

    def __init__(self, specs: Sequence[TaskSpec], settings: Settings) -> None:
        self._tasks = {task.name: task for task in make_graders(specs)}
        self._settings = settings
        self._is_sandboxed = settings.network
        signal.signal(signal.SIGALRM, _raise_timeout)

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
        with memory_limit(self._settings.memory_mib):
            for problem, text in answers:
                grades.append(self._grade(problem, text))
                if time.monotonic() - began > SECONDS_PER_CALL:
                    break
        return grades

    def _grade(self, problem: Problem, text: str) -> Grade:
        seconds = self._settings.timeout_seconds
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, ALARM_INTERVAL_SECONDS)
            return checked(self._tasks[problem.task].grade(problem, text))
        except GradeTimeout:
            return failed_grade(timeout_error(self._settings))
        except MemoryError:
            return failed_grade(MemoryError(f"more than rewards.memory_mib = {self._settings.memory_mib} MiB"))
        except BaseException as error:  # of a user's task: anything, SystemExit included
            return failed_grade(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def memory_limit(mib: int) -> Iterator[None]:
    """Limit the process to `mib` MiB of address space beyond its current size.

    Only during a call: Ray maps its object store when it first needs it.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = (pages * resource.getpagesize() + mib * 2**20, soft, hard)
    lowest = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def checked(grade: Any) -> Grade:
    """Return a valid grade; TypeError if it is no Grade, ValueError if its reward is not finite."""
    if not isinstance(grade, Grade):
        raise TypeError(f"grade: expected a Grade, got {type(grade).__name__}")
    if not math.isfinite(grade.reward):
        raise ValueError(f"reward: expected a finite number, got {grade.reward}")
    return grade


def failed_grade(error: BaseException) -> Grade:
    """Return the grade of an answer that could not be graded: reward 0 and the reason."""
    return Grade(0.0, False, {}, f"not graded: {type(error).__name__}: {error}")


def timeout_error(settings: Settings) -> TimeoutError:
    """Return the error of an answer that takes too long to grade."""
    return TimeoutError(f"more than rewards.timeout_seconds = {settings.timeout_seconds:g} s")


def _raise_timeout(number: int, frame: Any) -> None:
    raise GradeTimeout
