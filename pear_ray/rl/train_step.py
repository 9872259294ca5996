"""The parts of a learner rank: a training step on the rollouts of a batch; batches in, weights out, and a check that
engines compute the same log-probs.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from torch import Tensor

from pear_ray.config import Job
from pear_ray.data.batch_queue import GRACE_SECONDS, QueueClosed, take_batch
from pear_ray.losses import policy
from pear_ray.losses.packing import pack
from pear_ray.records import Completion, RolloutGroup, TrainingBatch, TrainingSequence
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.train.ray_train import latest_checkpoint, rank_and_world_size, save_checkpoint
from pear_ray.weights.adapters import adapter_partitions
from pear_ray.weights.publish import Publisher
from pear_ray.weights.registry import RankShard

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner, StepResult

# How often a rank that waits for rollouts asks whether the registry still knows its weights.
POLL_SECONDS = 5.0
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
    """Everything that the driver sends to each learner rank; `registry` and `queue` are actor handles.

    RankConfig(job, Path("runs/a"), "rl", "runs/a/sft/export", registry, queue)
    """

    job: Job
    run_dir: Path
    stage: str
    start_model: str
    registry: Any
    queue: Any

    @property
    def folder(self) -> Path:
        """Return the stage's output folder."""
        return self.run_dir / self.stage


class TrainStep(ABC):
    """Trains on the batch of each step."""

    def __init__(self, config: RankConfig) -> None:
        self._config = config
        self._job = config.job
        self._learners = self._build_learners()
        self.learner = next(iter(self._learners.values()))
        self._rl_loss = build_rl_loss(config.job)

    def _build_learners(self) -> Mapping[str, Learner]:
        """Return the learners by their names in the checkpoint; the first is the policy, which is published to the
        engines and exported."""
        # Not at import: the driver needs this class but not DeepSpeed.
        from pear_ray.train.learner import Learner

        job, rl = self._job, self._job.rl
        path = self._config.start_model
        return {"policy": Learner(path, job.model.dtype, job.learner, rl, rl.steps, job.run.seed)}

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

    def train(self, step: int, rollouts: RolloutBatch) -> tuple[dict[str, float], list[TrainingBatch]]:
        micro_batches = self.learner.micro_batches(training_sequences(self._job, rollouts.batch.groups))
        return step_metrics(self.learner.step(micro_batches, self._rl_loss)), micro_batches


def build_rl_loss(job: Job) -> policy.PolicyGradient:
    """Return the loss configured by [rl]."""
    rl, correction = job.rl, job.rl.importance_sampling
    losses = {"ppo": policy.PpoClip, "gspo": policy.Gspo, "cispo": policy.Cispo}
    aggregations = {
        "token": policy.TokenMean(),
        "sequence": policy.SequenceMean(),
        "constant": policy.ConstantLength(job.generator.max_new_tokens),
    }
    return policy.PolicyGradient(
        policy.Nft() if rl.loss.type == "nft" else losses[rl.loss.type](*rl.loss.clip_ratio),
        policy.RatioInLoss() if correction.type == "ratio" else policy.TruncatedIS(correction.cap),
        aggregations[rl.loss_agg],
        policy.KlToReference(rl.kl_coefficient) if rl.kl_coefficient else None,
    )


def training_sequences(job: Job, groups: Sequence[RolloutGroup]) -> list[TrainingSequence]:
    """Return one sequence per completion, with its advantage on each token that the policy sampled.

    With `rl.mask_truncated` the tokens of truncated completions are not trainable: overlong filtering (DAPO, arXiv
    2503.14476 section 3.4). Their rewards still count in the mean of the group. Tokens of a demonstration prefix have
    coefficient 1 and are marked `from_demonstration`. Raise RuntimeError if every completion is masked.
    """
    sequences = [
        _training_sequence(job, group, completion, advantage)
        for group in groups
        for completion, advantage in zip(group.completions, group.advantages, strict=True)
    ]
    if not any(sequence.trainable.any() for sequence in sequences):
        raise RuntimeError(
            "rl.mask_truncated: expected some completions to end within generator.max_new_tokens ="
            f" {job.generator.max_new_tokens}, got {len(sequences)} truncated ones, all masked"
        )
    return sequences


def _training_sequence(job: Job, group: RolloutGroup, completion: Completion, advantage: float) -> TrainingSequence:
    is_masked = job.rl.mask_truncated and completion.finish_reason == "length"
    num_prefix, reference = len(completion.prefix_ids), completion.reference_logprobs
    ids, logprobs = completion.prefix_ids + completion.token_ids, completion.prefix_logprobs + completion.logprobs
    trainable = [True] * num_prefix + [not is_masked] * len(completion.token_ids)
    row = group.prompt_ids, ids, logprobs, advantage, group.problem_id, trainable
    reference = None if reference is None else (0.0,) * num_prefix + reference
    sequence = TrainingSequence.of(*row, reference_logprobs=reference)
    if not num_prefix:
        return sequence
    from_demonstration = np.zeros(len(sequence.token_ids), bool)
    from_demonstration[len(group.prompt_ids) :][:num_prefix] = True
    coefficients = np.where(from_demonstration, np.float32(1), sequence.coefficients)
    return replace(sequence, coefficients=coefficients, from_demonstration=from_demonstration)


def step_metrics(result: StepResult) -> dict[str, float]:
    """Return the training metrics of an optimizer step."""
    sums, num_tokens = result.metric_sums, result.num_tokens
    weight = "weight" if "weight" in sums else "ratio"
    squared = float(sums[f"{weight}_squared"])
    metrics = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "num_tokens": num_tokens,
        # (sum w)^2 / sum w^2 of the importance weights, as a share of the tokens
        "effective_sample_size": float(sums[weight]) ** 2 / squared / num_tokens if squared else 0.0,
    }
    return metrics | {name: float(sums[key]) / num_tokens for name, key in TOKEN_MEANS.items() if key in sums}


class WeightPublisher:
    """Publishes this rank's shard of each version and takes batches. It keeps the last shards, so that it can announce
    them to a registry that restarted."""

    def __init__(self, config: RankConfig, train_step: TrainStep) -> None:
        self._job = config.job
        self._registry = config.registry
        self._queue = config.queue
        self._train_step = train_step
        self._rank, self._num_ranks = rank_and_world_size()
        weights = config.job.weights
        self._publisher = Publisher(self._rank, weights.bucket_mib, weights.full_every)
        self._shards: list[RankShard] = []
        self._next_problem = 0
        self._attempt: str = broadcast_from_first_rank(uuid.uuid4().hex)

    def publish(self, version: int, next_problem: int, full: bool = False) -> int:
        """Put this rank's shard into the object store and announce it; return its bytes. It is full if `full` or if the
        registry requests it."""
        full = full or self._requested_update(version) == "full"
        shard = self._publisher.publish(self._train_step.partitions(), version, full)
        # Shards held here stay in the store: only those an engine one version behind needs.
        self._shards = [old for old in self._shards if old.version == shard.base_version]
        self._shards.append(shard)
        self._next_problem = next_problem
        self._announce(shard)
        return shard.num_bytes

    def take(self, step: int) -> RolloutBatch | None:
        """Wait for the batch of a step; None if the generator side has failed. Raise TimeoutError after
        `learner.timeout_seconds`, RuntimeError if a token of it is older than `rl.max_staleness` allows."""
        timeout_seconds = self._job.learner.timeout_seconds
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                rollouts: RolloutBatch = take_batch(self._queue, step, min(POLL_SECONDS, timeout_seconds))
                break
            except QueueClosed:
                return None
            except TimeoutError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"learner.timeout_seconds: expected the rollouts of step {step} within"
                        f" {timeout_seconds:.0f} s, got none"
                    ) from error
            self._announce_again()
        check_staleness(step, rollouts.metrics["staleness_max"], self._job.rl.max_staleness)
        return rollouts

    def drop_before(self, step: int) -> None:
        """Have the queue drop batches that no rank will take again."""
        ray.get(self._queue.drop_before.remote(step), timeout=self._job.learner.timeout_seconds)

    def _announce_again(self) -> None:
        """Publish or announce the newest version again if the registry requests it."""
        newest = self._shards[-1].version
        request = self._requested_update(newest)
        # Ranks that announce a base and its delta again could miss each other forever.
        if request == "full" or (request == "announce" and len(self._shards) > 1):
            self.publish(newest, self._next_problem, full=True)
        elif request == "announce":
            self._announce(self._shards[0])

    def _announce(self, shard: RankShard) -> None:
        call = self._registry.announce.remote(shard, self._num_ranks, self._next_problem, self._attempt)
        ray.get(call, timeout=self._job.weights.timeout_seconds)

    def _requested_update(self, version: int) -> str:
        return ray.get(self._registry.requested_update.remote(version), timeout=GRACE_SECONDS)


class ParityCheck:
    """Engine/trainer log-prob parity: both sides score the same sequences under the same version. The difference is 0
    up to rounding if every weight arrived and both forward passes agree."""

    def __init__(self, job: Job, learner: Learner) -> None:
        self._job = job
        self._learner = learner
        self._logprobs: dict[int, list[np.ndarray]] = {}

    def check(self, step: int, rollouts: RolloutBatch) -> float | None:
        """Score the parity sequences with the weights before `step`; return the largest difference, in nats, to the
        engines' log-probs. None if no weight update of theirs is to a version scored here. Raise RuntimeError if the
        difference exceeds `weights.max_logprob_gap`. Every rank scores all, so that ranks need not communicate."""
        if rollouts.parity_sequences:
            self._logprobs[step] = self._score(rollouts.parity_sequences)
        oldest = step - self._job.rl.max_staleness - 1
        self._logprobs = {v: scored for v, scored in self._logprobs.items() if v >= oldest}
        limit, largest = self._job.weights.max_logprob_gap, None
        for update in rollouts.weight_updates:
            if update.version not in self._logprobs:
                continue
            pairs = zip(self._logprobs[update.version], update.parity_logprobs, strict=True)
            gap = max(float(np.abs(learner - engine).max()) for learner, engine in pairs)
            largest = max(gap, largest or 0.0)
            # Also raises for NaN.
            if not gap <= limit:
                raise RuntimeError(
                    f"step {step}: expected log-probs of engine and learner under version {update.version} to differ by"
                    f" at most weights.max_logprob_gap = {limit}, got {gap:.2e} nats"
                )
        return largest

    def _score(self, sequences: Sequence[TrainingSequence]) -> list[np.ndarray]:
        # Problem ids may repeat: the number of the sequence identifies it.
        numbered = [replace(sequence, origin=str(n)) for n, sequence in enumerate(sequences)]
        batches = pack(numbered, 1, self._job.learner.tokens_per_pack)[0]
        scored: dict[int, np.ndarray] = {}
        for batch, logprobs in zip(batches, self._learner.logprobs(batches), strict=True):
            owners = batch.sequence_ids_T[batch.trainable_T]
            scored |= {int(origin): logprobs[owners == n] for n, origin in enumerate(batch.origins)}
        return [scored[number] for number in range(len(sequences))]


def check_staleness(step: int, staleness: float, limit: int) -> None:
    """Raise RuntimeError if a token of a step's batch is older than `rl.max_staleness` allows."""
    if staleness > limit:
        raise RuntimeError(
            f"step {step}: expected tokens sampled at most rl.max_staleness = {limit} steps earlier, got"
            f" {staleness:.0f}"
        )


def broadcast_from_first_rank(value: Any) -> Any:
    """Return the first rank's `value` on all ranks; collective."""
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]
