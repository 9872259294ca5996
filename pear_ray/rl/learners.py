"""The learners' side: what every rank does."""

from __future__ import annotations

import logging
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from torch import Tensor

from pear_ray.config import Job
from pear_ray.data.batch_queue import QueueClosed
from pear_ray.metrics import Tracker
from pear_ray.records import TrainingBatch
from pear_ray.rl.monitor import RunMonitor
from pear_ray.rl.publisher import ParityCheck, WeightPublisher
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.train.ray_train import (
    CheckpointRef,
    PreemptionWatcher,
    latest_checkpoint,
    rank_and_count,
    save_checkpoint,
    setup_worker,
)
from pear_ray.weights.adapters import adapter_partitions

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner, StepResult

log = logging.getLogger(__name__)

# Numbers that are means over tokens, and the objective's facts that they are made of.
MEANS = {
    "entropy": "entropy",
    "ratio_mean": "ratio",
    "clip_frac": "clipped",
    "logprob_diff_mean": "mismatch",
    "mismatch_kl": "mismatch_kl",
    "is_clip_frac": "truncated",
    "reference_kl": "reference_kl",
}


class TrainStep(ABC):
    """What a stage does with the rollouts of a step. `learners` by the names under which a
    checkpoint holds them, of which engines serve the first, and that one is exported."""

    def __init__(self, job: Job, learners: Mapping[str, Learner]) -> None:
        self._job, self._learners = job, learners
        self.learner = next(iter(learners.values()))

    @abstractmethod
    def step(
        self, step: int, rollouts: RolloutBatch
    ) -> tuple[dict[str, float], list[TrainingBatch]]:
        """Learn from the rollouts; returns numbers for a line of metrics.jsonl, and this rank's
        micro-batches."""

    def partitions(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """What is published: this rank's partition of every parameter, or of adapters."""
        own, lora = self.learner.partitions(), self._job.learner.lora
        return own if lora is None else adapter_partitions(own, lora.alpha / lora.rank)

    def restore(self, kept: CheckpointRef, scratch: Path) -> None:
        """Go on from a checkpoint."""
        kept.restore(self._learners, scratch)

    def keep(self, next_step: int, next_problem: int) -> int:
        """Write a checkpoint; returns the step from which a broken run goes on at the earliest."""
        seconds = self._job.learner.timeout_seconds
        return save_checkpoint(self._learners, next_step, seconds, next_problem=next_problem)


def learn(
    make: Callable[[Job, dict[str, Any]], TrainStep], config: dict[str, Any]
) -> dict[str, Any]:
    """Step after step: take rollouts, learn from them, publish what came of it."""
    job, folder, stage = Job(**config["job"]), Path(config["folder"]), config["stage"]
    setup_worker(job, stage)
    rank, _ = rank_and_count()
    method = make(job, config)
    start = next_problem = 0
    if (kept := latest_checkpoint()) is not None:
        method.restore(kept, folder / stage)
        start, next_problem = kept.notes["next_step"], kept.notes["next_problem"]
    tracker = Tracker(folder, stage, job.tracking).rewind(start) if rank == 0 else None
    desk = WeightPublisher(job, config["board"], config["queue"], method.partitions)
    probes, log_book = ParityCheck(job, method.learner), RunMonitor(job, folder, stage, start)
    departures, end = PreemptionWatcher(), None
    desk.publish(start, next_problem)
    for step in range(start, job.rl.steps):
        began = time.perf_counter()
        try:
            rollouts = desk.take(step)
        except QueueClosed as error:
            # No other attempt would fare better: the stage says what became of the rollouts.
            return {"rollouts_ended": str(error)}
        taken = time.perf_counter()
        refuse_stale(job, step, rollouts)
        gap = probes.check(step, rollouts)
        numbers, packs = method.step(step, rollouts)
        learned = time.perf_counter()
        next_problem = rollouts.batch.next_problem
        num_bytes = desk.publish(step + 1, next_problem)
        published = time.perf_counter()
        row = {
            **rollouts.numbers,
            **numbers,
            **evaluation_numbers(rollouts),
            "logprob_parity_max": gap,
            "wait_seconds": taken - began,
            "train_seconds": learned - taken,
            "publish_seconds": published - learned,
            "published_mib_per_rank": num_bytes / 2**20,
            "step_seconds": published - began,
        }
        if tracker:
            tracker.log(step, **row)
            if step == start:
                log.info("%s: %s", stage, in_figures(job, packs, num_bytes), extra={"step": step})
        end = log_book.note(step, row)
        log_book.keep_best(method.learner, step + 1, rollouts, config["start"])
        if end:
            log.info("%s: ends early: %s", stage, end, extra={"step": step})
            break
        is_due = (step + 1) % job.learner.save_every == 0 and step + 1 < job.rl.steps
        if departures.any_new() or is_due:
            safe_step = method.keep(step + 1, next_problem)
            seconds = job.learner.timeout_seconds
            ray.get(desk.queue.forget_before.remote(safe_step), timeout=seconds)
    method.learner.export(folder / stage / "export", config["start"])
    if tracker:
        tracker.close()
    return {"steps": step + 1, "problems": next_problem, "ended_early": end}


def in_figures(job: Job, packs: Sequence[TrainingBatch], num_bytes: int) -> str:
    """What a step is made of, on one line: shapes and memory of a rank."""
    sizes = [len(pack.token_ids_T) for pack in packs]
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (
        f"a rank's step: {len(packs)} packs of {min(sizes)} to {max(sizes)} tokens (room for"
        f" {job.learner.tokens_per_pack}), peak memory {peak / 2**30:.2f} GiB,"
        f" {num_bytes / 2**20:.1f} MiB of weights published"
    )


def refuse_stale(job: Job, step: int, rollouts: RolloutBatch) -> None:
    """Raises RuntimeError where a token is older than rl.max_staleness allows."""
    lag = rollouts.numbers["staleness_max"]
    if lag > job.rl.max_staleness:
        raise RuntimeError(
            f"step {step}: a token was sampled {lag:.0f} steps before; expected at most"
            f" rl.max_staleness = {job.rl.max_staleness}"
        )


def evaluation_numbers(rollouts: RolloutBatch) -> dict[str, float]:
    """What was evaluated since the last step, the newest version of it."""
    if not rollouts.evaluations:
        return {}
    newest = max(rollouts.evaluations)
    return {"eval_version": newest, **rollouts.evaluations[newest]}


def numbers_of(result: StepResult) -> dict[str, float]:
    """The learning side's part of a line of metrics.jsonl."""
    facts, num_tokens = result.facts, result.num_tokens
    numbers = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "num_tokens": num_tokens,
        "effective_sample_size": effective_share(facts, num_tokens),
    }
    for name, fact in MEANS.items():
        if fact in facts:
            numbers[name] = float(facts[fact]) / num_tokens
    return numbers


def effective_share(facts: dict[str, np.ndarray], num_tokens: int) -> float:
    """(sum w)^2 / sum w^2 of what corrects for the sampling policy, as a share of the tokens."""
    name = "weight" if "weight" in facts else "ratio"
    squared = float(facts[f"{name}_squared"])
    return float(facts[name]) ** 2 / squared / num_tokens if squared else 0.0
