"""Train steps: two losses, that of [rl] for rollouts and that of [sft] for demonstrations, combined by each method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pear_ray.config import AlternateMethod, BridgeMethod, Cooperate, Job, SumMethod
from pear_ray.data.scored_dataset import RowGroup
from pear_ray.losses import mixed
from pear_ray.records import TrainingBatch, TrainingSequence
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.rl.train_step import RankConfig, TrainStep, step_metrics, training_sequences
from pear_ray.sft.loss import build_sft_loss
from pear_ray.weights.adapters import with_scaling

if TYPE_CHECKING:
    from pear_ray.train.cooperate_learners import WeightsAndLoraLearner
    from pear_ray.train.learner import Learner, StepResult

# Default learning rate of the adapters, relative to the weights'.
LORA_RATE_FACTOR = 10

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

    def __init__(self, groups: list[RowGroup], config: RankConfig) -> None:
        super().__init__(config)
        self._settings = cooperate_settings(config.job)
        self._sft_loss = build_sft_loss(demonstration_job(config.job), groups, self.learner)
        if (frac := self._settings.entropy_top_frac) < 1:
            self._sft_loss = replace(self._sft_loss, loss=mixed.HighEntropyOnly(self._sft_loss.loss, frac))

    def _train_on(self, sequences: list[TrainingSequence], loss: mixed.JointTokenMean) -> StepOutput:
        """Take one optimizer step."""
        micro_batches = self.learner.micro_batches(sequences)
        return mixed_metrics(self.learner.step(micro_batches, loss), micro_batches[0]), micro_batches

    def _demonstrations(self, rollouts: RolloutBatch) -> list[TrainingSequence]:
        """Return the demonstrations of a step, if any, with their tokens marked as such."""
        return [replace(sequence, from_demonstration=sequence.trainable) for sequence in rollouts.batch.demonstrations]


class SumStep(CooperateStep):
    """One loss: lambda times RL plus 1 - lambda times SFT. A loss with weight 0 is not computed; a step without
    demonstrations is RL alone."""

    def train(self, step: int, rollouts: RolloutBatch) -> StepOutput:
        completions = training_sequences(self._job, rollouts.batch.groups)
        sequences, rl_weight = self._mix(step, completions, rollouts)
        metrics, micro_batches = self._train_on(sequences, mixed.LambdaMix(self._rl_loss, self._sft_loss, rl_weight))
        return metrics | {"rl_weight": rl_weight}, micro_batches

    def _mix(
        self, step: int, completions: list[TrainingSequence], rollouts: RolloutBatch
    ) -> tuple[list[TrainingSequence], float]:
        """Return the sequences to train on, and lambda: 1 if the step has no demonstrations."""
        method = self._settings.method
        assert isinstance(method, SumMethod | BridgeMethod)
        rl_weight = mixed.rl_weight_at(step, self._job.rl.steps, method.rl_weight, method.rl_weight_final)
        demonstrations = self._demonstrations(rollouts) if rl_weight < 1 else []
        sequences = (completions if rl_weight > 0 else []) + demonstrations
        return sequences, rl_weight if demonstrations else 1.0


class AlternateStep(CooperateStep):
    """An optimizer step on rollouts, then one on demonstrations, if the step has any.

    With `frozen_frac` the second leaves alone the elements that the first changed most. Order and shared optimizer are
    this project's choices: AdamW's momentum stands in for MIFO+'s history.
    """

    def _build_learners(self) -> Mapping[str, Learner]:
        from pear_ray.train.cooperate_learners import FreezingLearner

        job, num_steps = self._job, 2 * self._job.rl.steps
        path = self._config.start_model
        return {"policy": FreezingLearner(path, job.model.dtype, job.learner, job.rl, num_steps, job.run.seed)}

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
        result = learner.step(sft_batches, mixed.JointTokenMean(self._rl_loss, self._sft_loss))
        if freezes:
            learner.reset(after_rl, masks)
            metrics["frozen_frac"] = float(np.mean([m.float().mean() for m in masks.values()]))
        metrics["sft_grad_norm"] = result.grad_norm
        return metrics | demonstration_metrics(result.metric_sums, sft_batches[0]), micro_batches


class TrapoStep(CooperateStep):
    """One loss: SFT on the prefixes and RL on the continuations, the mean over all tokens."""

    def train(self, step: int, rollouts: RolloutBatch) -> StepOutput:
        sequences = training_sequences(self._job, rollouts.batch.groups)
        return self._train_on(sequences, mixed.JointTokenMean(self._rl_loss, self._sft_loss))


class WeightsAndLoraStep(SumStep):
    """BRIDGE without its meta-objective: the adapters share the weights' loss."""

    @property
    def _method(self) -> BridgeMethod:
        method = cooperate_settings(self._job).method
        assert isinstance(method, BridgeMethod)
        return method

    def _build_learners(self) -> Mapping[str, Learner]:
        default_rate = LORA_RATE_FACTOR * self._job.rl.learning_rate
        return {"policy": self._build_learner(self._method.lora_learning_rate or default_rate)}

    def _build_learner(self, lora_learning_rate: float, **learner_updates: str) -> WeightsAndLoraLearner:
        """Return a learner of weights and adapters, with these changes to [learner]."""
        from pear_ray.train.cooperate_learners import WeightsAndLoraLearner

        job, lora = self._job, self._method.lora
        model, learner = (self._config.start_model, job.model.dtype), job.learner.model_copy(update=learner_updates)
        arguments = *model, learner, job.rl, job.rl.steps, job.run.seed
        return WeightsAndLoraLearner(*arguments, lora=lora, lora_learning_rate=lora_learning_rate)

    def partitions(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        return with_scaling(self.learner.partitions(), self._method.lora.alpha / self._method.lora.rank)


class BridgeStep(WeightsAndLoraStep):
    """BRIDGE (arXiv 2509.06948): SFT that asks at each step how much it helps RL.

    The policy is theta + w: weights and a low-rank adapter beside them. A shadow theta^ of the weights is trained by RL
    alone, and w is trained to make cooperation better than that. J_sft is the mean log-likelihood of demonstrations
    (weighted as in [sft]), J_rl the surrogate of the rollouts, lambda the weight of RL (section 3.2 of the paper, as
    secondary sources quote it):

        theta   ascends  (1 - lambda) J_sft(theta, w) + lambda J_rl(theta, w)
        theta^  ascends  J_rl(theta^, w)
        w       ascends  (1 - lambda) J_sft(theta, w) + lambda [J_rl(theta, w) - J_rl(theta^, w)]

    The bracket is the cooperative gain. All three use the values from before the step. This project's choices, since no
    code is public: AdamW and gradient clipping for each learner (weights and adapters of the policy clipped together,
    the shadow's weights alone); J_rl of the shadow has the same clipped ratio, of pi_{theta^ + w} to the policy that
    sampled; the learning rate of w is ten times that of theta; a refreshed shadow keeps its optimizer state.
    """

    def _build_learners(self) -> Mapping[str, Learner]:
        shadow = self._build_learner(lora_learning_rate=0.0, offload=self._method.shadow_offload)
        return {**super()._build_learners(), "shadow": shadow}

    def train(self, step: int, rollouts: RolloutBatch) -> StepOutput:
        policy: Any = self._learners["policy"]
        shadow: Any = self._learners["shadow"]
        refresh_steps = self._method.refresh_steps
        if refresh_steps and step and step % refresh_steps == 0:
            shadow.copy_from(policy, "weights")
        completions = training_sequences(self._job, rollouts.batch.groups)
        sequences, rl_weight = self._mix(step, completions, rollouts)
        micro_batches = policy.micro_batches(sequences)
        sums = policy.backward(micro_batches, mixed.LambdaMix(self._rl_loss, self._sft_loss, rl_weight))
        # Without demonstrations both learners must add in the same order, to stay equal.
        shadow_batches = micro_batches
        if rl_weight < 1:
            with_signal = completions
            if self._rl_loss.penalty is None:
                # The policy computes completions without loss and gradient too, for its metrics; the shadow has none.
                with_signal = [one for one in completions if one.coefficients.any()] or completions[:1]
            shadow_batches = shadow.micro_batches(with_signal, counted=completions)
        shadow_sums = shadow.backward(shadow_batches, self._rl_loss)
        policy.add_lora_gradients(shadow.take_lora_gradients(), -rl_weight)
        shadow_result = shadow.update(shadow_sums, shadow_batches[0].num_trainable_tokens_global)
        result = policy.update(sums, micro_batches[0].num_trainable_tokens_global)
        shadow.copy_from(policy, "lora")
        metrics = mixed_metrics(result, micro_batches[0]) | {
            "rl_weight": rl_weight,
            "shadow_loss": shadow_result.loss,
            "shadow_grad_norm": shadow_result.grad_norm,
        }
        if "rl_loss" in metrics:
            metrics["cooperative_gain"] = shadow_result.loss - metrics["rl_loss"]
        return metrics, micro_batches


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
    num_tokens, prefix = batch.num_demonstration_tokens_global, mixed.DEMONSTRATION_PREFIX
    if not num_tokens:
        return {}
    names = [name for name, value in metric_sums.items() if name.startswith(prefix) and np.ndim(value) == 0]
    sums = {name.removeprefix(prefix): float(metric_sums[name]) for name in names}
    metrics = {"loss": sums["loss"] / num_tokens, "nll": sums["nll"] / max(1.0, sums["tokens_to_learn"])}
    metrics["tokens"] = num_tokens
    if "weight" in sums:
        metrics["weight_mean"] = sums["weight"] / num_tokens
        metrics["effective_sample_size"] = sums["weight"] ** 2 / sums["weight_squared"] / num_tokens
    return {prefix + name: value for name, value in metrics.items()}
