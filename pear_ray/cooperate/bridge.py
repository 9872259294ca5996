"""BRIDGE (arXiv 2509.06948): SFT that asks, step by step, what it gains for RL.

The policy is theta + w: weights and a low-rank adapter beside them. A shadow theta^ of the weights
sees RL alone; w is taught to make cooperation worth more than that. With J_sft the mean
log-likelihood of traces (weighted, where [sft] says so), J_rl the surrogate of the rollouts, which
the policy sampled, and lambda their share (section 3.2 of the paper, as notes on it tell):

    theta   ascends  (1 - lambda) J_sft(theta, w) + lambda J_rl(theta, w)
    theta^  ascends  J_rl(theta^, w)
    w       ascends  (1 - lambda) J_sft(theta, w) + lambda [J_rl(theta, w) - J_rl(theta^, w)]

The bracket is the cooperative gain. All three see the values from before the step. This project's
choices, where nothing is public: AdamW with clipping for each of the two learners (policy and
adapters are clipped together, the shadow's weights alone); J_rl of the shadow has the same clipped
ratio, of pi_{theta^ + w} to the policy that sampled; w has ten times the learning rate of theta; a
refreshed shadow keeps the running means of its optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pear_ray.config import Job
from pear_ray.config import Learner as Settings
from pear_ray.cooperate.methods import SumStep, Told
from pear_ray.cooperate.metrics import both_signals_metrics
from pear_ray.cooperate.settings import settings_of
from pear_ray.losses.mixed import LambdaMix
from pear_ray.records import TrainingSequence
from pear_ray.rl.build import sequences_of
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.weights.adapters import with_scaling

if TYPE_CHECKING:
    from pear_ray.train.bridge_learner import WeightsAndLoraLearner
    from pear_ray.train.learner import Learner

# What the adapters learn faster than the weights, unless the job says how fast they learn.
TIMES_FASTER = 10


class AdapterStep(SumStep):
    """BRIDGE without its meta-objective: adapters learn what the weights learn, and there is no
    shadow."""

    def _learners_of(self, job: Job, start: str) -> Mapping[str, Learner]:
        settings = settings_of(job)
        rate = settings.lora_learning_rate or TIMES_FASTER * job.rl.learning_rate
        return {"policy": joint_learner(job, start, job.learner, rate)}

    def partitions(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        lora = self._settings.lora
        return with_scaling(self.learner.partitions(), lora.alpha / lora.rank)


class BridgeStep(AdapterStep):
    """All three updates."""

    def _learners_of(self, job: Job, start: str) -> Mapping[str, Learner]:
        offload = {"offload": settings_of(job).shadow_offload}
        shadow = joint_learner(job, start, job.learner.model_copy(update=offload), 0.0)
        return {**super()._learners_of(job, start), "shadow": shadow}

    def step(self, step: int, rollouts: RolloutBatch) -> Told:
        policy: Any = self._learners["policy"]
        shadow: Any = self._learners["shadow"]
        every = self._settings.refresh_steps
        if every and step and step % every == 0:
            shadow.copy(policy, of_adapters=False)
        answers = sequences_of(self._job, rollouts.batch.groups)
        packs, share = self._mixture(step, answers, rollouts)
        facts = policy.backward(packs, LambdaMix(self._rl, self._sft, share))
        # Without traces the two are to differ in nothing, not in the order of a sum either.
        alone = shadow.share(self._with_signal(answers), counted=answers) if share < 1 else packs
        of_shadow = shadow.backward(alone, self._rl)
        policy.add_adapter_gradients(shadow.take_adapter_gradients(), -share)
        without = shadow.update(of_shadow, alone[0].num_trainable_tokens_global)
        result = policy.update(facts, packs[0].num_trainable_tokens_global)
        shadow.copy(policy, of_adapters=True)
        numbers = both_signals_metrics(result, packs[0]) | {
            "rl_weight": share,
            "shadow_loss": without.loss,
            "shadow_grad_norm": without.grad_norm,
        }
        if "rl_loss" in numbers:
            numbers["cooperative_gain"] = without.loss - numbers["rl_loss"]
        return numbers, packs

    def _with_signal(self, answers: list[TrainingSequence]) -> list[TrainingSequence]:
        """Answers whose loss and gradient are not 0. The policy looks at the others too, for what a
        step says of itself; of the shadow's nothing is said."""
        if self._rl.penalty is not None:
            return answers
        return [answer for answer in answers if answer.coefficients.any()] or answers[:1]


def joint_learner(job: Job, start: str, settings: Settings, rate: float) -> WeightsAndLoraLearner:
    """Weights and adapters, the latter with a learning rate of their own."""
    from pear_ray.train.bridge_learner import WeightsAndLoraLearner

    return WeightsAndLoraLearner(
        start,
        job.model.dtype,
        settings,
        job.rl,
        job.rl.steps,
        job.run.seed,
        lora=settings_of(job).lora,
        adapters_learning_rate=rate,
    )
