"""A stage that learns from rollouts: its name, and what it does its own way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pear_ray.config import Job
from pear_ray.rl.scheduler import RolloutScheduler
from pear_ray.run import RunDir
from pear_ray.weights.adapters import AdapterCache
from pear_ray.weights.fetch import WeightCache


@dataclass(frozen=True)
class RolloutStage:
    """`start` is the folder or hub name of the model it begins with. `course(job, start,
    first_step, first_problem)` decides which problems are asked and what a step learns from;
    `replica()` is what an engine fetches weights with."""

    job: Job
    run: RunDir
    name: str
    start: str
    scheduler: Callable[[Job, str, int, int], RolloutScheduler] = RolloutScheduler
    replica: Callable[[], WeightCache | AdapterCache] = WeightCache

    @property
    def folder(self) -> Path:
        """What the stage makes lies here."""
        return self.run.folder / self.name


def rollout_stage(
    job: Job,
    run: RunDir,
    name: str,
    scheduler: Callable[[Job, str, int, int], RolloutScheduler] = RolloutScheduler,
) -> RolloutStage:
    """The stage of this name: it begins with what `sft` has exported, or else with the model of
    the job. Where adapters are trained alone, they travel alone."""
    export = run.folder / "sft" / "export"
    start = str(export if export.exists() else job.model_path())
    replica = WeightCache if job.learner.lora is None else partial(AdapterCache, start)
    return RolloutStage(job, run, name, start, scheduler, replica)
