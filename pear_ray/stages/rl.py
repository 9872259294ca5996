"""Reinforcement learning on verified answers.

Learners (DeepSpeed ZeRO-3 under Ray Train) and generators (vLLM actors) meet at two small actors:
the board, which knows the newest weights, and the queue, which holds finished rollouts.

    generators                          board                 learners
      wait for version >= step - staleness  <---- announce ---- publish partitions
      pull it, answer problems, judge                           take step's rollouts, learn
      put rollouts of the step  ----------> queue ------------>

With max_staleness = 0 the two sides alternate and every token is on-policy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from pear_ray.actors.board import Board, RolloutQueue
from pear_ray.actors.cluster import connect
from pear_ray.actors.pool import GeneratorPool
from pear_ray.actors.training import keep, limit_threads, rank_and_count, restore, train
from pear_ray.actors.verifiers import Verifier
from pear_ray.algorithms.advantages import group_advantages
from pear_ray.algorithms.objectives import ClippedPolicyGradient
from pear_ray.algorithms.packing import pack
from pear_ray.algorithms.seeds import seed_of
from pear_ray.config import Job
from pear_ray.engines.generator import Request
from pear_ray.engines.learner import Learner, Optimisation, StepResult
from pear_ray.engines.model import load_tokenizer, prompt_ids
from pear_ray.manifest import Run
from pear_ray.records import Completion, Problem, RolloutGroup, TrainingSequence, Verdict
from pear_ray.tasks import endless_problems, make_tasks
from pear_ray.tracking import Tracker
from pear_ray.weights.publish import publish

log = logging.getLogger(__name__)

NUM_PROBES = 8


@dataclass(frozen=True)
class Rollouts:
    """Everything that generators hand over for one learner step. `probe` holds fixed answers with
    the log-probs that the serving engine gives them NOW, so that the learner can check that both
    sides hold the same weights; `numbers` are the sampling side's metrics."""

    version: int
    groups: tuple[RolloutGroup, ...]
    probe: tuple[tuple[TrainingSequence, np.ndarray], ...]
    numbers: dict[str, float]


def run(job: Job, run: Run) -> dict[str, Any]:
    """Start both sides, and end the one when the other ends."""
    connect()
    board = Board.remote()  # type: ignore[attr-defined]
    queue = RolloutQueue.remote()  # type: ignore[attr-defined]
    start = str(start_folder(job, run.folder))
    config = {
        "job": job.model_dump(),
        "folder": str(run.folder),
        "start": start,
        "board": board,
        "queue": queue,
    }
    with (
        GeneratorPool(start, job.model.dtype, job.generator, job.run.seed) as pool,
        ThreadPoolExecutor(1) as executor,
    ):
        rollouts = executor.submit(roll_out, job, start, pool, board, queue)
        try:
            return train(learn, config, job.learner, run.folder / "rl" / "checkpoints")
        except BaseException:
            if rollouts.done() and rollouts.exception() is not None:
                rollouts.result()
            raise
        finally:
            ray.get(board.close.remote("the learners have ended"))


def start_folder(job: Job, folder: Path) -> Path | str:
    """What RL starts from: the export of `sft` where there is one, else the model itself."""
    export = folder / "sft" / "export"
    return export if export.exists() else job.model_path()


def roll_out(job: Job, start: str, pool: GeneratorPool, board: Any, queue: Any) -> None:
    """The generators' side: for each learner step, fresh answers to the next problems."""
    verifier = Verifier(job.tasks)
    try:
        tokenizer = load_tokenizer(start)
        deadline = job.learner.deadline_seconds
        version = ray.get(board.newest.remote(0, deadline))
        served = -1
        probe: tuple[TrainingSequence, ...] = ()
        problems = endless_problems(make_tasks(job.tasks), "train", seed_of(job.run.seed, "rl"))
        # The position in the stream of problems is the step: none is used twice, none is skipped.
        skipped = version.version * job.rl.problems_per_step
        for step in range(version.version, job.rl.steps):
            started = time.perf_counter()
            version = ray.get(board.newest.remote(step - job.rl.max_staleness, deadline))
            waited = time.perf_counter() - started
            pause = 0.0
            if version.version != served:
                pause = pool.update(version, job.weights.deadline_seconds)
                served = version.version
            batch = list(islice(problems, skipped, skipped + job.rl.problems_per_step))
            skipped = 0
            sampling = time.perf_counter()
            requests = [
                Request(
                    tuple(prompt_ids(tokenizer, problem.messages)),
                    job.rl.group_size,
                    seed_of(job.run.seed, "rl", problem.problem_id, epoch),
                )
                for epoch, problem in batch
            ]
            answers = pool.sample(requests, job.rl.temperature)
            sampled = time.perf_counter() - sampling
            groups = judged(job, [p for _, p in batch], requests, answers, verifier)
            probe = probe or first_answers(groups)
            rows = [(s.token_ids[~s.trainable], s.token_ids[s.trainable]) for s in probe]
            scores = pool.score([(p.tolist(), r.tolist()) for p, r in rows])
            numbers = rollout_numbers(groups, job.generator.max_new_tokens) | {
                "generator_wait_seconds": waited,
                "pause_seconds": pause,
                "sample_seconds": sampled,
            }
            rollouts = Rollouts(served, groups, tuple(zip(probe, scores, strict=True)), numbers)
            ray.get(queue.put.remote(step, [ray.put(rollouts)]))
    except BaseException as error:
        ray.get(queue.close.remote(f"the rollouts failed: {error!r}"))
        raise
    finally:
        verifier.close()


def judged(
    job: Job,
    problems: Sequence[Problem],
    requests: Sequence[Request],
    answers: Sequence[Sequence[Completion]],
    verifier: Verifier,
) -> tuple[RolloutGroup, ...]:
    """Verdicts and advantages of every group."""
    pairs = [
        (p, answer.text) for p, group in zip(problems, answers, strict=True) for answer in group
    ]
    verdicts = iter(verifier.judge(pairs))
    groups = []
    for problem, request, completions in zip(problems, requests, answers, strict=True):
        own: tuple[Verdict, ...] = tuple(islice(verdicts, len(completions)))
        rewards_G = torch.tensor([verdict.reward for verdict in own])
        advantages = tuple(group_advantages(rewards_G, job.rl.advantage).tolist())
        groups.append(
            RolloutGroup(
                problem.problem_id, request.prompt_ids, tuple(completions), own, advantages
            )
        )
    return tuple(groups)


def first_answers(groups: Sequence[RolloutGroup]) -> tuple[TrainingSequence, ...]:
    """One answer to each of the first problems: the probe of the whole run."""
    return tuple(sequence_of(group, 0) for group in groups[:NUM_PROBES])


def sequence_of(group: RolloutGroup, member: int) -> TrainingSequence:
    """One answer as tokens, with its advantage on each of them."""
    answer = group.completions[member]
    return TrainingSequence.of(
        group.prompt_ids,
        answer.token_ids,
        answer.logprobs,
        group.advantages[member],
        group.problem_id,
    )


def learn(config: dict[str, Any]) -> dict[str, Any]:
    """The learners' side: what every rank does."""
    limit_threads()
    job, folder = Job(**config["job"]), Path(config["folder"])
    board, queue = config["board"], config["queue"]
    rank, num_ranks = rank_and_count()
    settings = job.rl
    learner = Learner(
        config["start"],
        job.model.dtype,
        job.learner,
        Optimisation(
            settings.steps,
            settings.learning_rate,
            settings.schedule,
            settings.warmup_fraction,
            settings.weight_decay,
            settings.max_grad_norm,
        ),
        job.run.seed,
    )
    start = restore(learner)
    tracker = Tracker(folder, "rl", job.tracking).rewind(start) if rank == 0 else None
    objective = ClippedPolicyGradient(*settings.clip_ratio)
    probed: dict[int, list[np.ndarray]] = {}

    def announce(version: int) -> None:
        buckets = publish(learner.partitions(), rank, job.weights.bucket_mib)
        ray.get(board.announce.remote(version, rank, num_ranks, buckets))

    announce(start)
    for step in range(start, settings.steps):
        started = time.perf_counter()
        reference = ray.get(queue.take.remote(step, job.learner.deadline_seconds))
        rollouts: Rollouts = ray.get(reference[0], timeout=job.learner.deadline_seconds)
        waited = time.perf_counter() - started
        probe = pack([s for s, _ in rollouts.probe], 1, job.learner.tokens_per_micro_batch)[0]
        probed[step] = learner.logprobs(probe)
        # A learner that restarted has not held the versions before its checkpoint.
        gap = probe_gap(probe, probed.get(rollouts.version, []), rollouts.probe)
        if gap > job.weights.max_probe_gap:
            raise RuntimeError(
                f"step {step}: generator and learner differ by {gap:.2e} nats on the probe under"
                f" weights version {rollouts.version}; expected at most weights.max_probe_gap ="
                f" {job.weights.max_probe_gap}"
            )
        probed = {version: p for version, p in probed.items() if version >= rollouts.version}
        sequences = [
            sequence_of(group, member)
            for group in rollouts.groups
            for member in range(len(group.completions))
        ]
        batches = pack(sequences, num_ranks, job.learner.tokens_per_micro_batch)[rank]
        learning = time.perf_counter()
        result = learner.step(batches, objective)
        learned = time.perf_counter() - learning
        publishing = time.perf_counter()
        announce(step + 1)
        published = time.perf_counter() - publishing
        if tracker:
            numbers = (
                rollouts.numbers
                | numbers_of(result)
                | {
                    "probe_gap_max": gap,
                    "staleness": step - rollouts.version,
                    "wait_seconds": waited,
                    "learn_seconds": learned,
                    "publish_seconds": published,
                    "step_seconds": time.perf_counter() - started,
                }
            )
            tracker.log(step, **numbers)
            log.info(
                "rl: step %d of %d, pass rate %.3f", step + 1, settings.steps, numbers["pass_rate"]
            )
        if (step + 1) % job.learner.steps_per_checkpoint == 0 and step + 1 < settings.steps:
            keep(learner, step + 1)
            ray.get(queue.forget_before.remote(step + 1))
    learner.export(folder / "rl" / "export", config["start"])
    if tracker:
        tracker.close()
    return {"steps": settings.steps, "problems": settings.steps * settings.problems_per_step}


def probe_gap(
    batches: Sequence[Any],
    logprobs: Sequence[np.ndarray],
    probe: Sequence[tuple[TrainingSequence, np.ndarray]],
) -> float:
    """Largest difference between learner and generator over the probe's tokens, in nats."""
    by_origin = {sequence.origin: scores for sequence, scores in probe}
    gap = 0.0
    for batch, found in zip(batches, logprobs, strict=False):
        expected = np.concatenate([by_origin[origin] for origin in batch.origins])
        gap = max(gap, float(np.abs(found - expected).max()))
    return gap


def rollout_numbers(groups: Sequence[RolloutGroup], max_new_tokens: int) -> dict[str, float]:
    """The sampling side's part of a line of metrics.jsonl."""
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    answers = [answer for group in groups for answer in group.completions]
    return {
        "reward_mean": float(np.mean([verdict.reward for verdict in verdicts])),
        "pass_rate": float(np.mean([verdict.correct for verdict in verdicts])),
        "groups_without_signal_share": float(
            np.mean([len({verdict.reward for verdict in group.verdicts}) == 1 for group in groups])
        ),
        "response_tokens_mean": float(np.mean([len(answer.token_ids) for answer in answers])),
        "truncated_share": float(np.mean([answer.finish_reason == "length" for answer in answers])),
    }


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
