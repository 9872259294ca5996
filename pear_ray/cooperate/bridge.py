"""BRIDGE (arXiv 2509.06948): SFT that asks at each step how much it helps RL.

The policy is theta + w: weights and a low-rank adapter beside them. A shadow theta^ of the weights is trained by RL
alone, and w is trained to make cooperation better than that. J_sft is the mean log-likelihood of demonstrations
(weighted as in [sft]), J_rl the surrogate of the rollouts, lambda the weight of RL (section 3.2 of the paper, as
secondary sources quote it):

    theta   ascends  (1 - lambda) J_sft(theta, w) + lambda J_rl(theta, w)
    theta^  ascends  J_rl(theta^, w)
    w       ascends  (1 - lambda) J_sft(theta, w) + lambda [J_rl(theta, w) - J_rl(theta^, w)]

The bracket is the cooperative gain. All three use the values from before the step. This project's choices, since no
code is public: AdamW and gradient clipping for each learner (weights and adapters of the policy clipped together, the
shadow's weights alone); J_rl of the shadow has the same clipped ratio, of pi_{theta^ + w} to the policy that sampled;
the learning rate of w is ten times that of theta; a refreshed shadow keeps its optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pear_ray.config import BridgeMethod, Job
from pear_ray.cooperate.methods import StepOutput, SumStep, cooperate_settings, mixed_metrics
from pear_ray.losses.mixed import LambdaMix
from pear_ray.records import TrainingSequence
from pear_ray.rl.build import training_sequences
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.rl.train_step import RankConfig
from pear_ray.weights.adapters import with_scaling

if TYPE_CHECKING:
    from pear_ray.train.cooperate_learners import WeightsAndLoraLearner
    from pear_ray.train.learner import Learner

# Default learning rate of the adapters, relative to the weights'.
LORA_RATE_FACTOR = 10


class WeightsAndLoraStep(SumStep):
    """BRIDGE without its meta-objective: the adapters share the weights' loss."""

    def _build_learners(self, config: RankConfig) -> Mapping[str, Learner]:
        rate = bridge_method(config.job).lora_learning_rate
        rate = rate or LORA_RATE_FACTOR * config.job.rl.learning_rate
        return {"policy": build_learner(config, rate)}

    def partitions(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        lora = bridge_method(self._job).lora
        return with_scaling(self.learner.partitions(), lora.alpha / lora.rank)


class BridgeStep(WeightsAndLoraStep):
    """The three updates above."""

    def _build_learners(self, config: RankConfig) -> Mapping[str, Learner]:
        offload = bridge_method(config.job).shadow_offload
        shadow = build_learner(config, lora_learning_rate=0.0, offload=offload)
        return {**super()._build_learners(config), "shadow": shadow}

    def train(self, step: int, rollouts: RolloutBatch) -> StepOutput:
        policy: Any = self._learners["policy"]
        shadow: Any = self._learners["shadow"]
        refresh_steps = bridge_method(self._job).refresh_steps
        if refresh_steps and step and step % refresh_steps == 0:
            shadow.copy_from(policy, "weights")
        completions = training_sequences(self._job, rollouts.batch.groups)
        sequences, rl_weight = self._mix(step, completions, rollouts)
        micro_batches = policy.micro_batches(sequences)
        sums = policy.backward(micro_batches, LambdaMix(self._rl_loss, self._sft_loss, rl_weight))
        # Without demonstrations both learners must add in the same order, to stay equal.
        shadow_batches = micro_batches
        if rl_weight < 1:
            with_signal = self._with_signal(completions)
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

    def _with_signal(self, completions: list[TrainingSequence]) -> list[TrainingSequence]:
        """Return the completions whose loss and gradient are not 0. The policy computes the others too, for its
        metrics; the shadow has none."""
        if self._rl_loss.penalty is not None:
            return completions
        return [one for one in completions if one.coefficients.any()] or completions[:1]


def bridge_method(job: Job) -> BridgeMethod:
    """Return cooperate.method of a job with BRIDGE."""
    method = cooperate_settings(job).method
    assert isinstance(method, BridgeMethod)
    return method


def build_learner(config: RankConfig, lora_learning_rate: float, **learner_updates: str) -> WeightsAndLoraLearner:
    """Return a learner of weights and adapters, with these changes to [learner]."""
    from pear_ray.train.cooperate_learners import WeightsAndLoraLearner

    job = config.job
    return WeightsAndLoraLearner(
        config.start_model,
        job.model.dtype,
        job.learner.model_copy(update=learner_updates),
        job.rl,
        job.rl.steps,
        job.run.seed,
        lora=bridge_method(job).lora,
        lora_learning_rate=lora_learning_rate,
    )
