"""Reinforcement learning on verified answers.

Learners (DeepSpeed ZeRO-3 under Ray Train) and generators (vLLM actors) meet at two small actors:
the board, which knows the newest weights, and the queue, which holds finished rollouts.

    generators                                board                     learners
      wait for version >= step - max_staleness  <--- announce ---  publish own partitions
      pull, check and load it                                      take the step's rollouts
      answer problems, judge the answers                           one optimiser step on them
      rollouts of the step ----------------->  queue  ----------->

With max_staleness = 0 the two sides alternate and every token is on-policy; with k > 0 the same
two loops overlap.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from pear_ray.actors.board import GRACE_SECONDS, Board, StepQueue, take
from pear_ray.actors.cluster import connect
from pear_ray.actors.pool import GeneratorPool
from pear_ray.actors.rollouts import Rollouts, RolloutStream, sequence_of
from pear_ray.actors.training import begin, keep, newest, rank_and_count, train
from pear_ray.actors.verifiers import Verifier
from pear_ray.algorithms.objectives import ClippedPolicyGradient
from pear_ray.algorithms.packing import pack
from pear_ray.config import Job
from pear_ray.engines.suitable import refuse_unsuitable
from pear_ray.manifest import Run
from pear_ray.records import TrainingBatch, TrainingSequence
from pear_ray.tracking import Tracker
from pear_ray.weights.publish import publish

if TYPE_CHECKING:
    from pear_ray.engines.learner import Learner, StepResult

log = logging.getLogger(__name__)


def run(job: Job, run: Run) -> dict[str, Any]:
    """Start both sides, and end the one when the other ends."""
    export = run.folder / "sft" / "export"
    start = str(export if export.exists() else job.model_path())
    refuse_unsuitable(job, start)
    connect()
    board = Board.remote()  # type: ignore[attr-defined]
    queue = StepQueue.remote()  # type: ignore[attr-defined]
    config = {
        "job": job.model_dump(),
        "folder": str(run.folder),
        "start": start,
        "board": board,
        "queue": queue,
    }
    with ThreadPoolExecutor(1) as executor:
        rollouts: Future[None] = executor.submit(roll_out, job, start, board, queue)
        try:
            return train(learn, config, job.learner, run.folder / "rl" / f"{run.folder.name}-rl")
        except Exception as error:
            if rollouts.done() and (cause := rollouts.exception()) is not None:
                raise cause from error
            raise
        finally:
            ray.get(board.close.remote("the learners have ended"), timeout=GRACE_SECONDS)


def roll_out(job: Job, start: str, board: Any, queue: Any) -> None:
    """The generators' side: for each learner step, fresh answers to the next problems. Engines
    start while the learners do."""
    deadline = job.learner.deadline_seconds
    patience = deadline + GRACE_SECONDS
    verifier = Verifier(job.tasks)
    try:
        with GeneratorPool(start, job.model.dtype, job.generator, job.run.seed) as pool:
            first_step = ray.get(board.newest.remote(0, deadline), timeout=patience).version
            stream = RolloutStream(job, start, first_step, pool, verifier)
            for step in range(first_step, job.rl.steps):
                wanted = board.newest.remote(step - job.rl.max_staleness, deadline)
                version = ray.get(wanted, timeout=patience)
                rollouts = stream.next(version)
                ray.get(queue.put.remote(step, [ray.put(rollouts)]), timeout=deadline)
                log.info("rl: step %d of %d: %s", step + 1, job.rl.steps, in_words(rollouts))
    except BaseException as error:
        ray.get(queue.close.remote(f"the rollouts failed: {error!r}"), timeout=GRACE_SECONDS)
        raise
    finally:
        verifier.close()


def in_words(rollouts: Rollouts) -> str:
    """One step's rollouts on a line that fits a terminal."""
    numbers = rollouts.numbers
    return (
        f"pass rate {numbers['pass_rate']:.3f}, {numbers['response_tokens_mean']:.1f} tokens an"
        f" answer, sampled in {numbers['sample_seconds']:.1f} s"
    )


def learn(config: dict[str, Any]) -> dict[str, Any]:
    """The learners' side: what every rank does."""
    # The driver, which only names this function, need not wait for DeepSpeed.
    from pear_ray.engines.learner import Learner

    begin()
    job, folder = Job(**config["job"]), Path(config["folder"])
    board, queue = config["board"], config["queue"]
    rank, num_ranks = rank_and_count()
    learner = Learner(
        config["start"], job.model.dtype, job.learner, job.rl, job.rl.steps, job.run.seed
    )
    start = 0
    if (kept := newest()) is not None:
        kept.restore(learner, folder / "rl")
        start = kept.notes["next_step"]
    tracker = Tracker(folder, "rl", job.tracking).rewind(start) if rank == 0 else None
    objective = ClippedPolicyGradient(*job.rl.clip_ratio)
    probed: dict[int, dict[str, np.ndarray]] = {}

    def announce(version: int) -> None:
        buckets = publish(learner.partitions(), rank, job.weights.bucket_mib)
        announced = board.announce.remote(version, rank, num_ranks, buckets)
        ray.get(announced, timeout=job.weights.deadline_seconds)

    announce(start)
    for step in range(start, job.rl.steps):
        began = time.perf_counter()
        rollouts: Rollouts = take(queue, step, job.learner.deadline_seconds)
        taken = time.perf_counter()
        probed[step] = probe_logprobs(learner, rollouts, job.learner.tokens_per_pack)
        gap = check_probe(job, step, rollouts, probed.get(rollouts.version, {}))
        sequences = [
            sequence_of(group, member)
            for group in rollouts.groups
            for member in range(len(group.completions))
        ]
        result = learner.step(learner.share(sequences), objective)
        learned = time.perf_counter()
        announce(step + 1)
        published = time.perf_counter()
        if tracker:
            measured = {
                "probe_gap_max": gap,
                "staleness": step - rollouts.version,
                "wait_seconds": taken - began,
                "learn_seconds": learned - taken,
                "publish_seconds": published - learned,
                "step_seconds": published - began,
            }
            tracker.log(step, **rollouts.numbers, **numbers_of(result), **measured)
        if (step + 1) % job.learner.steps_per_checkpoint == 0 and step + 1 < job.rl.steps:
            safe_step = keep(learner, step + 1, job.learner.deadline_seconds)
            ray.get(queue.forget_before.remote(safe_step), timeout=job.learner.deadline_seconds)
    learner.export(folder / "rl" / "export", config["start"])
    if tracker:
        tracker.close()
    return {"steps": job.rl.steps, "problems": job.rl.steps * job.rl.problems_per_step}


def probe_logprobs(
    learner: Learner, rollouts: Rollouts, tokens_per_pack: int
) -> dict[str, np.ndarray]:
    """The learner's log-probs of the probe's answers, by origin. Every rank scores all of them,
    so that none has to tell the others."""
    sequences: Sequence[TrainingSequence] = [sequence for sequence, _ in rollouts.probe]
    batches: list[TrainingBatch] = pack(sequences, 1, tokens_per_pack)[0]
    found: dict[str, np.ndarray] = {}
    for batch, logprobs in zip(batches, learner.logprobs(batches), strict=True):
        owners = batch.sequence_ids_T[batch.trainable_T]
        for number, origin in enumerate(batch.origins):
            found[origin] = logprobs[owners == number]
    return found


def check_probe(job: Job, step: int, rollouts: Rollouts, ours: dict[str, np.ndarray]) -> float:
    """Largest difference between generator and learner on the probe, in nats; 0 where a learner
    that restarted has never held the version in question.

    Raises:
        RuntimeError: it is too large: the two sides do not hold the same weights.
    """
    gap = max(
        (float(np.abs(ours[s.origin] - scores).max()) for s, scores in rollouts.probe if ours),
        default=0.0,
    )
    if gap > job.weights.max_probe_gap:
        raise RuntimeError(
            f"step {step}: generator and learner differ by {gap:.2e} nats on the probe under"
            f" weights version {rollouts.version}; expected at most weights.max_probe_gap ="
            f" {job.weights.max_probe_gap}"
        )
    return gap


def numbers_of(result: StepResult) -> dict[str, float]:
    """The learning side's part of a line of metrics.jsonl."""
    facts, num_tokens = result.facts, result.num_tokens
    squared = float(facts["ratio_squared"])
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "num_tokens": num_tokens,
        "entropy": float(facts["entropy"]) / num_tokens,
        "ratio_mean": float(facts["ratio"]) / num_tokens,
        "clipped_share": float(facts["clipped"]) / num_tokens,
        "mismatch_mean": float(facts["mismatch"]) / num_tokens,
        "mismatch_kl": float(facts["mismatch_kl"]) / num_tokens,
        "effective_sample_size": float(facts["ratio"]) ** 2 / squared / num_tokens,
    }
