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

from pear_ray.config import TaskSpec
from pear_ray.config import Verifier as Settings
from pear_ray.records import Problem, Verdict
from pear_ray.rewards.sandbox import take_network
from pear_ray.tasks import make_judges

# A call ends early, so that one which is late for longer hangs in an answer.
SECONDS_PER_CALL = 1.0
# An exception can be lost in a destructor or a callback: the alarm rings again.
SECONDS_TO_NEXT_ALARM = 1.0


class Late(BaseException):
    """The alarm rang. No Exception: judges catch those."""


@ray.remote(num_cpus=0)
class VerifierActor:
    """All tasks of a job, judging one answer after another."""

    def __init__(self, specs: Sequence[TaskSpec], settings: Settings) -> None:
        self._tasks = {task.name: task for task in make_judges(specs)}
        self._settings, self._is_prepared = settings, False
        signal.signal(signal.SIGALRM, _ring)

    def ready(self) -> bool:
        return True

    def judge(self, answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Verdicts on the first answers, as many as a second is enough for, and at least one."""
        self._prepare()
        verdicts: list[Verdict] = []
        began = time.monotonic()
        with memory_limit(self._settings.memory_mib):
            for problem, text in answers:
                verdicts.append(self._verdict(problem, text))
                if time.monotonic() - began > SECONDS_PER_CALL:
                    break
        return verdicts

    def _prepare(self) -> None:
        """Once tasks have read what they need, this thread, which judges, loses the network."""
        if not (self._is_prepared or self._settings.network):
            take_network()
        self._is_prepared = True

    def _verdict(self, problem: Problem, text: str) -> Verdict:
        seconds = self._settings.seconds_per_verdict
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, SECONDS_TO_NEXT_ALARM)
            return checked(self._tasks[problem.task].verdict(problem, text))
        except Late:
            return no_verdict(late(self._settings))
        except MemoryError:
            return no_verdict(
                MemoryError(f"more than verifier.memory_mib = {self._settings.memory_mib} MiB")
            )
        except BaseException as error:  # of a user's task: any, SystemExit too
            return no_verdict(error)
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


def checked(verdict: Any) -> Verdict:
    """A verdict that can be learned from.

    Raises:
        TypeError: it is none.
        ValueError: its reward is no finite number.
    """
    if not isinstance(verdict, Verdict):
        raise TypeError(f"verdict: read {type(verdict).__name__}, expected a Verdict")
    if not math.isfinite(verdict.reward):
        raise ValueError(f"reward: read {verdict.reward}, expected a finite number")
    return verdict


def no_verdict(error: BaseException) -> Verdict:
    """What an answer gets that could not be judged: nothing, and the reason."""
    return Verdict(0.0, False, {}, f"no verdict: {type(error).__name__}: {error}")


def late(settings: Settings) -> TimeoutError:
    """The reason why an answer was not judged to the end."""
    return TimeoutError(
        f"more than verifier.seconds_per_verdict = {settings.seconds_per_verdict:g} s"
    )


def _ring(number: int, frame: Any) -> None:
    raise Late
