"""Reinforcement learning on verified answers: each step learns from one batch of fresh rollouts,
and what came of it is published for the next (`pear_ray.rl.loop`)."""

from __future__ import annotations

from functools import partial
from typing import Any

from pear_ray.config import Job
from pear_ray.records import TrainingBatch
from pear_ray.rl import loop
from pear_ray.rl.build import objective_of, sequences_of
from pear_ray.rl.learners import TrainStep, learn, numbers_of
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.rl.stage import rollout_stage
from pear_ray.run import RunDir


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Both sides, until the last step."""
    return loop.run(rollout_stage(job, run, "rl"), partial(learn, PolicyGradientStep))


class PolicyGradientStep(TrainStep):
    """One optimizer step on the rollouts of each step."""

    def __init__(self, job: Job, config: dict[str, Any]) -> None:
        from pear_ray.train.learner import Learner

        learner = Learner(
            config["start"], job.model.dtype, job.learner, job.rl, job.rl.steps, job.run.seed
        )
        super().__init__(job, {"policy": learner})
        self._objective = objective_of(job)

    def step(
        self, step: int, rollouts: RolloutBatch
    ) -> tuple[dict[str, float], list[TrainingBatch]]:
        packs = self.learner.share(sequences_of(self._job, rollouts.batch.groups))
        return numbers_of(self.learner.step(packs, self._objective)), packs
