"""Verdicts in a process of their own, each within its time and memory.

What that separates: an answer that makes its judge loop, crash, exit or fill the memory costs its
own verdict, and neither another verdict nor the job, nor can it reach the network (see `offline`).
What it does not: the process has the rights of the user who started Ray, and its files. That is
enough where a verdict treats answers as data, as `countdown` and `math` do; some judges of
`reasoning_gym` evaluate answers as Python (its docstring names them), and a task of one's own does
what it does. Where answers may run, the cluster must be one that nothing else is in reach of.
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

# A call ends early, so that one which is late for longer hangs in an answer.
SECONDS_PER_CALL = 1.0
# An exception can be lost in a destructor or a callback: the alarm rings again.
SECONDS_TO_NEXT_ALARM = 1.0


class GradeTimeout(BaseException):
    """The alarm rang. No Exception: judges catch those."""


@ray.remote(num_cpus=0)
class RewardWorker:
    """All tasks of a job, judging one answer after another."""

    def __init__(self, specs: Sequence[TaskSpec], settings: Settings) -> None:
        self._tasks = {task.name: task for task in make_graders(specs)}
        self._settings, self._is_prepared = settings, False
        signal.signal(signal.SIGALRM, _ring)

    def ready(self) -> bool:
        return True

    def grade(self, answers: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Verdicts on the first answers, as many as a second is enough for, and at least one."""
        self._prepare()
        grades: list[Grade] = []
        began = time.monotonic()
        with memory_limit(self._settings.memory_mib):
            for problem, text in answers:
                grades.append(self._verdict(problem, text))
                if time.monotonic() - began > SECONDS_PER_CALL:
                    break
        return grades

    def _prepare(self) -> None:
        """Once tasks have read what they need, this thread, which judges, loses the network."""
        if not (self._is_prepared or self._settings.network):
            deny_network()
        self._is_prepared = True

    def _verdict(self, problem: Problem, text: str) -> Grade:
        seconds = self._settings.timeout_seconds
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, SECONDS_TO_NEXT_ALARM)
            return checked(self._tasks[problem.task].grade(problem, text))
        except GradeTimeout:
            return failed_grade(late(self._settings))
        except MemoryError:
            return failed_grade(
                MemoryError(f"more than rewards.memory_mib = {self._settings.memory_mib} MiB")
            )
        except BaseException as error:  # of a user's task: any, SystemExit too
            return failed_grade(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def memory_limit(mib: int) -> Iterator[None]:
    """Lets the process map `mib` MiB more than it has mapped. Only for a time: Ray maps its object
    store whenever it first needs it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + mib * 2**20
    within = [limit for limit in (wanted, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(within), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def checked(grade: Any) -> Grade:
    """A verdict that can be learned from.

    Raises:
        TypeError: it is none.
        ValueError: its reward is no finite number.
    """
    if not isinstance(grade, Grade):
        raise TypeError(f"grade: read {type(grade).__name__}, expected a Grade")
    if not math.isfinite(grade.reward):
        raise ValueError(f"reward: read {grade.reward}, expected a finite number")
    return grade


def failed_grade(error: BaseException) -> Grade:
    """What an answer gets that could not be judged: nothing, and the reason."""
    return Grade(0.0, False, {}, f"no verdict: {type(error).__name__}: {error}")


def late(settings: Settings) -> TimeoutError:
    """The reason why an answer was not judged to the end."""
    return TimeoutError(f"more than rewards.timeout_seconds = {settings.timeout_seconds:g} s")


def _ring(number: int, frame: Any) -> None:
    raise GradeTimeout
