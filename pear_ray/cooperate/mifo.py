"""MIFO (arXiv 2510.04454): SFT on demonstrations of prompts that the policy fails, on their high-entropy tokens
(`losses.mixed.HighEntropyOnly`), with the parameters frozen that RL moved most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from pear_ray.config import AlternateMethod, Job
from pear_ray.cooperate.demonstrations import DemonstrationIndex
from pear_ray.cooperate.methods import CooperateStep, StepOutput, cooperate_settings, demonstration_metrics
from pear_ray.losses.mixed import JointTokenMean
from pear_ray.records import RolloutGroup
from pear_ray.rl.build import training_sequences
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.rl.scheduler import RolloutScheduler, StepBatch
from pear_ray.rl.train_step import RankConfig, step_metrics

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner


class AlternateStep(CooperateStep):
    """An optimizer step on rollouts, then one on demonstrations, if the step has any.

    With `frozen_frac` the second leaves alone the elements that the first changed most. Order and shared optimizer are
    this project's choices: AdamW's momentum stands in for MIFO+'s history.
    """

    def _build_learners(self, config: RankConfig) -> Mapping[str, Learner]:
        from pear_ray.train.cooperate_learners import FreezingLearner

        job, num_steps = config.job, 2 * config.job.rl.steps
        learner = FreezingLearner(config.start_model, job.model.dtype, job.learner, job.rl, num_steps, job.run.seed)
        return {"policy": learner}

    def train(self, step: int, rollouts: RolloutBatch) -> StepOutput:
        learner: Any = self.learner
        method = self._settings.method
        assert isinstance(method, AlternateMethod)
        freezes = method.frozen_frac > 0
        before = learner.snapshot() if freezes else {}
        micro_batches = learner.micro_batches(training_sequences(self._job, rollouts.batch.groups))
        result = learner.step(micro_batches, self._rl_loss)
        metrics = step_metrics(result) | {"rl_loss": result.loss}
        demonstrations = self._demonstrations(rollouts)
        if not demonstrations:
            return metrics, micro_batches
        masks = learner.most_changed(before, method.frozen_frac) if freezes else {}
        after_rl = learner.snapshot() if freezes else {}
        sft_batches = learner.micro_batches(demonstrations)
        result = learner.step(sft_batches, JointTokenMean(self._rl_loss, self._sft_loss))
        if freezes:
            learner.reset(after_rl, masks)
            metrics["frozen_frac"] = float(np.mean([m.float().mean() for m in masks.values()]))
        metrics["sft_grad_norm"] = result.grad_norm
        return metrics | demonstration_metrics(result.metric_sums, sft_batches[0]), micro_batches


class FailedPromptScheduler(RolloutScheduler):
    """A rollout scheduler whose batches also have the demonstrations of failed prompts, in their order: prompts with at
    most `cooperate.failed_pass_rate` correct completions. Dropped ones count: under dynamic sampling a prompt that
    always fails is dropped."""

    def __init__(self, index: DemonstrationIndex, job: Job, path: str, first_step: int, first_problem: int) -> None:
        super().__init__(job, path, first_step, first_problem)
        self._index = index
        self._failed_pass_rate = cooperate_settings(job).failed_pass_rate

    def _build_batch(self, groups: tuple[RolloutGroup, ...], dropped: tuple[str, ...]) -> StepBatch:
        demonstrations = []
        for pending in islice(self._pending.values(), len(groups + dropped)):
            group = pending.group
            if group is None or pass_rate(group) > self._failed_pass_rate:
                continue
            if (found := self._index.find(group.prompt_ids)) is not None:
                demonstrations.append(found.training_sequence(group.prompt_ids))
        batch = super()._build_batch(groups, dropped)
        return replace(batch, demonstrations=tuple(demonstrations))


def pass_rate(group: RolloutGroup) -> float:
    """Return the fraction of correct completions."""
    return float(np.mean([grade.correct for grade in group.grades]))
