"""Verdicts in a process of their own, which is killed when it is late."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from pear_ray.config import TaskSpec
from pear_ray.records import Problem, Verdict
from pear_ray.tasks import make_tasks


@ray.remote(num_cpus=0)
class VerifierActor:
    """All tasks of a job, judging one answer after another."""

    def __init__(self, specs: Sequence[TaskSpec]) -> None:
        self._tasks = {task.name: task for task in make_tasks(specs)}

    def judge(self, answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        return [self._verdict(problem, text) for problem, text in answers]

    def _verdict(self, problem: Problem, text: str) -> Verdict:
        try:
            return self._tasks[problem.task].verdict(problem, text)
        except Exception as error:  # of a user's task: any
            return no_verdict(error)


class Verifier:
    """Judges answers. One that hangs, fails or kills the process costs its own verdict alone."""

    def __init__(self, specs: Sequence[TaskSpec], seconds_per_call: float = 60.0) -> None:
        self._specs = tuple(specs)
        self._seconds_per_call = seconds_per_call
        self._actor = VerifierActor.remote(self._specs)  # type: ignore[attr-defined]

    def judge(self, answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """A verdict for each (problem, answer), in order."""
        if not answers:
            return []
        try:
            return ray.get(self._actor.judge.remote(answers), timeout=self._seconds_per_call)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
            ray.kill(self._actor)
            self._actor = VerifierActor.remote(self._specs)  # type: ignore[attr-defined]
            if len(answers) == 1:
                return [no_verdict(error)]
            middle = len(answers) // 2
            return self.judge(answers[:middle]) + self.judge(answers[middle:])

    def close(self) -> None:
        """End the process."""
        ray.kill(self._actor)


def no_verdict(error: Exception) -> Verdict:
    """What an answer gets that could not be judged: nothing, and the reason."""
    return Verdict(0.0, False, {}, f"no verdict: {type(error).__name__}: {error}")
