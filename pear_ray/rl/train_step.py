"""One training step on a batch of rollouts, and the record that starts a learner rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pear_ray.config import Job
from pear_ray.records import TrainingBatch
from pear_ray.rl.build import build_rl_loss, training_sequences
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.train.ray_train import latest_checkpoint, save_checkpoint
from pear_ray.weights.adapters import adapter_partitions

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner, StepResult

# Metrics that are means over tokens, and the loss's sum for each.
TOKEN_MEANS = {
    "entropy": "entropy",
    "ratio_mean": "ratio",
    "clip_frac": "clipped",
    "logprob_diff_mean": "mismatch",
    "mismatch_kl": "mismatch_kl",
    "is_clip_frac": "truncated",
    "reference_kl": "reference_kl",
}


@dataclass(frozen=True)
class RankConfig:
    """Everything that the driver sends to each learner rank.

    RankConfig(job, Path("runs/a"), "rl", "runs/a/sft/export", registry, queue)
    """

    job: Job
    run_dir: Path
    stage: str
    start_model: str
    registry: Any
    """Actor handle of `PolicyVersions`."""
    queue: Any
    """Actor handle of `BatchQueue`."""

    @property
    def folder(self) -> Path:
        """Return the stage's output folder."""
        return self.run_dir / self.stage


class TrainStep(ABC):
    """Trains on the batch of each step.

    `learners` maps names in the checkpoint to learners; the first is the policy, which is published to the engines and
    exported.
    """

    def __init__(self, config: RankConfig, learners: Mapping[str, Learner]) -> None:
        self._config = config
        self._job = config.job
        self._learners = learners
        self.learner = next(iter(learners.values()))

    @abstractmethod
    def train(self, step: int, rollouts: RolloutBatch) -> tuple[dict[str, float], list[TrainingBatch]]:
        """Train on a batch; return the step's metrics and this rank's micro-batches."""

    def partitions(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Yield (name, shape, this rank's partition) of every published parameter: all of them, or the adapters if only
        these are trained."""
        partitions, lora = self.learner.partitions(), self._job.learner.lora
        return partitions if lora is None else adapter_partitions(partitions, lora.alpha / lora.rank)

    def resume(self) -> tuple[int, int]:
        """Load the latest checkpoint, if any; return the next step and the next problem."""
        checkpoint = latest_checkpoint()
        if checkpoint is None:
            return 0, 0
        checkpoint.restore(self._learners, self._config.folder)
        return checkpoint.metadata["next_step"], checkpoint.metadata["next_problem"]

    def save(self, next_step: int, next_problem: int) -> int:
        """Write a checkpoint; return the earliest step from which the run can resume."""
        seconds = self._job.learner.timeout_seconds
        return save_checkpoint(self._learners, next_step, seconds, next_problem=next_problem)


class PolicyGradientStep(TrainStep):
    """Stage `rl`: one optimizer step on the rollouts of each batch."""

    def __init__(self, config: RankConfig) -> None:
        # Not at import: the driver needs this class but not DeepSpeed.
        from pear_ray.train.learner import Learner

        job, rl = config.job, config.job.rl
        learner = Learner(config.start_model, job.model.dtype, job.learner, rl, rl.steps, job.run.seed)
        super().__init__(config, {"policy": learner})
        self._loss = build_rl_loss(job)

    def train(self, step: int, rollouts: RolloutBatch) -> tuple[dict[str, float], list[TrainingBatch]]:
        sequences = training_sequences(self._job, rollouts.batch.groups)
        micro_batches = self.learner.micro_batches(sequences)
        return step_metrics(self.learner.step(micro_batches, self._loss)), micro_batches


def step_metrics(result: StepResult) -> dict[str, float]:
    """Return the training metrics of an optimizer step."""
    sums, num_tokens = result.metric_sums, result.num_tokens
    metrics = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "num_tokens": num_tokens,
        "effective_sample_size": effective_sample_size(sums, num_tokens),
    }
    means = {name: float(sums[key]) / num_tokens for name, key in TOKEN_MEANS.items() if key in sums}
    return metrics | means


def effective_sample_size(sums: Mapping[str, np.ndarray], num_tokens: int) -> float:
    """Return (sum w)^2 / sum w^2 of the importance weights, as a share of the tokens."""
    name = "weight" if "weight" in sums else "ratio"
    squared = float(sums[f"{name}_squared"])
    return float(sums[name]) ** 2 / squared / num_tokens if squared else 0.0
