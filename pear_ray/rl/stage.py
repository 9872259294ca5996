"""A stage that learns from rollouts: its name, and what it does its own way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pear_ray.config import Job
from pear_ray.rl.scheduler import Course
from pear_ray.run import Run
from pear_ray.weights.adapters import AdapterReplica
from pear_ray.weights.fetch import Replica


@dataclass(frozen=True)
class Stage:
    """`start` is the folder or hub name of the model it begins with. `course(job, start,
    first_step, first_problem)` decides which problems are asked and what a step learns from;
    `replica()` is what an engine fetches weights with."""

    job: Job
    run: Run
    name: str
    start: str
    course: Callable[[Job, str, int, int], Course] = Course
    replica: Callable[[], Replica | AdapterReplica] = Replica

    @property
    def folder(self) -> Path:
        """What the stage makes lies here."""
        return self.run.folder / self.name


def stage_of(
    job: Job,
    run: Run,
    name: str,
    course: Callable[[Job, str, int, int], Course] = Course,
) -> Stage:
    """The stage of this name: it begins with what `sft` has exported, or else with the model of
    the job. Where adapters are trained alone, they travel alone."""
    export = run.folder / "sft" / "export"
    start = str(export if export.exists() else job.model_path())
    replica = Replica if job.learner.lora is None else partial(AdapterReplica, start)
    return Stage(job, run, name, start, course, replica)
