"""Shared parts of the methods, and the weighted sum of both losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pear_ray.config import BridgeMethod, Cooperate, Job, SumMethod
from pear_ray.data.scored_dataset import RowFilter, RowGroup, batches
from pear_ray.data.scored_dataset import training_sequences as sequences_of_rows
from pear_ray.losses import mixed
from pear_ray.records import RolloutGroup, TrainingBatch, TrainingSequence
from pear_ray.rl.build import build_rl_loss, training_sequences
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.rl.scheduler import RolloutScheduler, StepBatch
from pear_ray.rl.train_step import RankConfig, TrainStep, step_metrics
from pear_ray.sft.loss import build_sft_loss

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner, StepResult

StepOutput = tuple[dict[str, float], list[TrainingBatch]]


def cooperate_settings(job: Job) -> Cooperate:
    """Return [cooperate], which a job with this stage has."""
    assert job.cooperate is not None
    return job.cooperate


def demonstration_job(job: Job) -> Job:
    """Return the job with the [sft] that holds for demonstrations, `cooperate.sft` applied."""
    return job.model_copy(update={"sft": cooperate_settings(job).sft_of(job.sft)})


class CooperateStep(TrainStep):
    """A train step with two losses: that of [rl] for rollouts, of [sft] for demonstrations."""

    def __init__(self, groups: Sequence[RowGroup], config: RankConfig) -> None:
        super().__init__(config, self._build_learners(config))
        job = config.job
        self._settings = cooperate_settings(job)
        self._rl_loss = build_rl_loss(job)
        self._sft_loss = build_sft_loss(demonstration_job(job), groups, self.learner)
        if (frac := self._settings.entropy_top_frac) < 1:
            loss = mixed.HighEntropyOnly(self._sft_loss.loss, frac)
            self._sft_loss = replace(self._sft_loss, loss=loss)

    def _build_learners(self, config: RankConfig) -> Mapping[str, Learner]:
        """Return the learners by their names in the checkpoint, the policy first."""
        from pear_ray.train.learner import Learner

        job, rl = config.job, config.job.rl
        learner = Learner(config.start_model, job.model.dtype, job.learner, rl, rl.steps, job.run.seed)
        return {"policy": learner}

    def _train_on(self, sequences: list[TrainingSequence], loss: mixed.JointTokenMean) -> StepOutput:
        """Take one optimizer step."""
        micro_batches = self.learner.micro_batches(sequences)
        result = self.learner.step(micro_batches, loss)
        return mixed_metrics(result, micro_batches[0]), micro_batches

    def _demonstrations(self, rollouts: RolloutBatch) -> list[TrainingSequence]:
        """Return the demonstrations of a step, if any, with their tokens marked as such."""
        return [replace(sequence, from_demonstration=sequence.trainable) for sequence in rollouts.batch.demonstrations]


class SumStep(CooperateStep):
    """One loss: lambda times RL plus 1 - lambda times SFT. A loss with weight 0 is not computed; a step without
    demonstrations is RL alone."""

    def train(self, step: int, rollouts: RolloutBatch) -> StepOutput:
        completions = training_sequences(self._job, rollouts.batch.groups)
        sequences, rl_weight = self._mix(step, completions, rollouts)
        loss = mixed.LambdaMix(self._rl_loss, self._sft_loss, rl_weight)
        metrics, micro_batches = self._train_on(sequences, loss)
        return metrics | {"rl_weight": rl_weight}, micro_batches

    def _mix(
        self, step: int, completions: list[TrainingSequence], rollouts: RolloutBatch
    ) -> tuple[list[TrainingSequence], float]:
        """Return the sequences to train on, and lambda: 1 if the step has no demonstrations."""
        method = self._settings.method
        assert isinstance(method, SumMethod | BridgeMethod)
        weights = method.rl_weight, method.rl_weight_final
        rl_weight = mixed.rl_weight_at(step, self._job.rl.steps, *weights)
        demonstrations = self._demonstrations(rollouts) if rl_weight < 1 else []
        sequences = (completions if rl_weight > 0 else []) + demonstrations
        return sequences, rl_weight if demonstrations else 1.0


class MixedDataScheduler(RolloutScheduler):
    """A rollout scheduler whose batches also have the corpus rows that `sft` would train on in the same step, over and
    over if there are fewer than all steps need."""

    def __init__(
        self, sft_job: Job, groups: Sequence[RowGroup], job: Job, path: str, first_step: int, first_problem: int
    ) -> None:
        super().__init__(job, path, first_step, first_problem)
        self._negative_coefficient = sft_job.sft.negative_coefficient
        num_rows = sum(group.num_train for group in groups)
        self._tables = batches(
            groups,
            RowFilter.from_job(sft_job),
            num_epochs=-(-job.rl.steps * sft_job.sft.examples_per_step // num_rows),
            rows_per_step=sft_job.sft.examples_per_step,
            rows_per_window=sft_job.sft.rows_per_window,
            seed=job.run.seed,
            first_step=first_step,
        )

    def _build_batch(self, groups: tuple[RolloutGroup, ...], dropped: tuple[str, ...]) -> StepBatch:
        batch = super()._build_batch(groups, dropped)
        rows = sequences_of_rows(next(self._tables), self._negative_coefficient)
        return replace(batch, demonstrations=tuple(rows))


def mixed_metrics(result: StepResult, batch: TrainingBatch) -> dict[str, float]:
    """Return the metrics of a step whose loss is one of `losses.mixed`: those of `rl` for rollouts, and the
    demonstrations' with a prefix. The SFT loss and the reward stand side by side, since each rises at the expense of
    the other (arXiv 2601.07389). `batch` is any of its micro-batches.
    """
    metrics = {"loss": result.loss, "grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
    num_tokens = batch.num_trainable_tokens_global - batch.num_demonstration_tokens_global
    if num_tokens:
        metrics = step_metrics(replace(result, num_tokens=num_tokens)) | metrics
        metrics["rl_loss"] = float(result.metric_sums["rl_loss"]) / num_tokens
    return metrics | demonstration_metrics(result.metric_sums, batch)


def demonstration_metrics(metric_sums: Mapping[str, np.ndarray], batch: TrainingBatch) -> dict[str, float]:
    """Return a step's metrics of demonstrations, per token; none if it had none."""
    num_tokens = batch.num_demonstration_tokens_global
    if not num_tokens:
        return {}
    sums = {
        name.removeprefix(mixed.DEMONSTRATION_PREFIX): float(value)
        for name, value in metric_sums.items()
        if name.startswith(mixed.DEMONSTRATION_PREFIX) and np.ndim(value) == 0
    }
    metrics = {
        "loss": sums["loss"] / num_tokens,
        "nll": sums["nll"] / max(1.0, sums["tokens_to_learn"]),
        "tokens": num_tokens,
    }
    if "weight" in sums:
        metrics["weight_mean"] = sums["weight"] / num_tokens
        metrics["effective_sample_size"] = sums["weight"] ** 2 / sums["weight_squared"] / num_tokens
    return {mixed.DEMONSTRATION_PREFIX + name: value for name, value in metrics.items()}
