"""What a step does with rollouts and traces, all but BRIDGE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pear_ray.config import Job
from pear_ray.cooperate.metrics import both_signals_metrics, numbers_of_rollouts, of_traces
from pear_ray.cooperate.settings import settings_of, traces_job
from pear_ray.losses.mixed import HighEntropyOnly, JointTokenMean, LambdaMix, rl_weight_at
from pear_ray.losses.sft import Supervised
from pear_ray.records import TrainingBatch, TrainingSequence
from pear_ray.rl.build import objective_of, sequences_of
from pear_ray.rl.learners import TrainStep
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.sft.build import objective_of as supervised_of

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner

Told = tuple[dict[str, float], list[TrainingBatch]]


class TwoSignalStep(TrainStep):
    """What the methods have in common: a learner, both objectives, and the traces of a step."""

    def __init__(self, job: Job, config: dict[str, Any]) -> None:
        super().__init__(job, self._learners_of(job, config["start"]))
        self._settings = settings_of(job)
        shown = traces_job(job)
        self._rl = objective_of(job)
        sft = supervised_of(shown, config["groups"], self.learner)
        share = self._settings.entropy_top_frac
        self._sft: Supervised = (
            sft if share == 1 else replace(sft, loss=HighEntropyOnly(sft.loss, share))
        )

    def _learners_of(self, job: Job, start: str) -> Mapping[str, Learner]:
        from pear_ray.train.learner import Learner

        learner = Learner(start, job.model.dtype, job.learner, job.rl, job.rl.steps, job.run.seed)
        return {"policy": learner}

    def _traces_of(self, rollouts: RolloutBatch) -> list[TrainingSequence]:
        """A step's traces, marked as such; there may be none."""
        traces = rollouts.batch.traces
        return [replace(sequence, from_trace=sequence.trainable) for sequence in traces]


class SumStep(TwoSignalStep):
    """One loss: lambda times that of the rollouts and 1 - lambda times that of the traces. What is
    multiplied by 0 is not computed; where a step has no traces it is that of the rollouts."""

    def step(self, step: int, rollouts: RolloutBatch) -> Told:
        answers = sequences_of(self._job, rollouts.batch.groups)
        packs, share = self._mixture(step, answers, rollouts)
        result = self.learner.step(packs, LambdaMix(self._rl, self._sft, share))
        return both_signals_metrics(result, packs[0]) | {"rl_weight": share}, packs

    def _mixture(
        self, step: int, answers: list[TrainingSequence], rollouts: RolloutBatch
    ) -> tuple[list[TrainingBatch], float]:
        """What the step learns from, and lambda: 1 where it has no traces."""
        settings = self._settings
        share = rl_weight_at(step, self._job.rl.steps, settings.rl_weight, settings.last_rl_weight)
        traces = self._traces_of(rollouts) if share < 1 else []
        packs = self.learner.share((answers if share > 0 else []) + traces)
        return packs, share if traces else 1.0


class TrapoStep(TwoSignalStep):
    """TRAPO (arXiv 2512.17636): the policy goes on from the beginnings of traces, the beginning is
    learned as a trace and what follows by RL, in one loss."""

    def step(self, step: int, rollouts: RolloutBatch) -> Told:
        packs = self.learner.share(sequences_of(self._job, rollouts.batch.groups))
        result = self.learner.step(packs, JointTokenMean(self._rl, self._sft))
        return both_signals_metrics(result, packs[0]), packs


class AlternateStep(TwoSignalStep):
    """An optimizer step on rollouts, then one on traces, with one optimizer for both (the order and
    the shared optimizer are this project's choices). As MIFO (arXiv 2510.04454) has it, the second
    may leave alone what the first has moved most; AdamW's own momentum stands for the history that
    MIFO+ keeps. A step without traces has the first alone."""

    def _learners_of(self, job: Job, start: str) -> Mapping[str, Learner]:
        from pear_ray.train.freeze import FreezingLearner

        num_steps = 2 * job.rl.steps
        learner = FreezingLearner(
            start, job.model.dtype, job.learner, job.rl, num_steps, job.run.seed
        )
        return {"policy": learner}

    def step(self, step: int, rollouts: RolloutBatch) -> Told:
        learner: Any = self.learner
        share = self._settings.frozen_frac
        before = learner.values() if share else {}
        packs = learner.share(sequences_of(self._job, rollouts.batch.groups))
        numbers = numbers_of_rollouts(learner.step(packs, self._rl))
        traces = self._traces_of(rollouts)
        if not traces:
            return numbers, packs
        held = learner.moved_most(before, share) if share else {}
        values = learner.values() if share else {}
        more = learner.share(traces)
        result = learner.step(more, JointTokenMean(self._rl, self._sft))
        if held:
            learner.put_back(values, held)
            numbers["frozen_frac"] = float(np.mean([mask.float().mean() for mask in held.values()]))
        numbers["sft_grad_norm"] = result.grad_norm
        return numbers | of_traces(result.facts, more[0]), packs
