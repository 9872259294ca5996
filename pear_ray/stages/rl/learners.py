"""The learners' side: what every rank does."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch

from pear_ray.actors.board import GRACE_SECONDS, Closed, take
from pear_ray.actors.training import Departures, begin, keep, newest, rank_and_count
from pear_ray.algorithms.packing import pack
from pear_ray.config import Job
from pear_ray.records import TrainingBatch, TrainingSequence
from pear_ray.stages.rl.objective import ends_of, objective_of, sequences_of, warnings_of
from pear_ray.stages.rl.rollouts import Rollouts
from pear_ray.tracking import Tracker
from pear_ray.weights.adapters import adapter_partitions
from pear_ray.weights.manifest import Share
from pear_ray.weights.publish import Publisher

if TYPE_CHECKING:
    from pear_ray.engines.learner import Learner, StepResult

log = logging.getLogger(__name__)

# How long a rank waits for rollouts before it asks whether the board still knows its weights.
LOOK_SECONDS = 5.0
# Steps in which a warning is not repeated.
STEPS_OF_SILENCE = 20
# Numbers that are means over tokens, and the objective's facts that they are made of.
MEANS = {
    "entropy": "entropy",
    "ratio_mean": "ratio",
    "clipped_share": "clipped",
    "mismatch_mean": "mismatch",
    "mismatch_kl": "mismatch_kl",
    "truncated_weight_share": "truncated",
    "reference_kl": "reference_kl",
}


def learn(config: dict[str, Any]) -> dict[str, Any]:
    """Step after step: take rollouts, learn from them, publish what came of it."""
    # The driver, which only names this function, need not wait for DeepSpeed.
    from pear_ray.engines.learner import Learner

    job, folder = Job(**config["job"]), Path(config["folder"])
    begin(job, "rl")
    rank, _ = rank_and_count()
    learner = Learner(
        config["start"], job.model.dtype, job.learner, job.rl, job.rl.steps, job.run.seed
    )
    start = next_problem = 0
    if (kept := newest()) is not None:
        kept.restore(learner, folder / "rl")
        start, next_problem = kept.notes["next_step"], kept.notes["next_problem"]
    tracker = Tracker(folder, "rl", job.tracking).rewind(start) if rank == 0 else None
    desk = Desk(job, config["board"], config["queue"], learner)
    objective, probes = objective_of(job), Probes(job, learner)
    log_book, departures, end = LogBook(job, folder, start), Departures(), None
    desk.publish(start, next_problem)
    for step in range(start, job.rl.steps):
        began = time.perf_counter()
        try:
            rollouts = desk.take(step)
        except Closed as error:
            # No other attempt would fare better: the stage says what became of the rollouts.
            return {"rollouts_ended": str(error)}
        taken = time.perf_counter()
        refuse_stale(job, step, rollouts)
        gap = probes.check(step, rollouts)
        packs = learner.share(sequences_of(job, rollouts.lesson.groups))
        result = learner.step(packs, objective)
        learned = time.perf_counter()
        next_problem = rollouts.lesson.next_problem
        num_bytes = desk.publish(step + 1, next_problem)
        published = time.perf_counter()
        row = {
            **rollouts.numbers,
            **numbers_of(result),
            **evaluation_numbers(rollouts),
            "probe_gap_max": gap,
            "wait_seconds": taken - began,
            "learn_seconds": learned - taken,
            "publish_seconds": published - learned,
            "published_mib_per_rank": num_bytes / 2**20,
            "step_seconds": published - began,
        }
        if tracker:
            tracker.log(step, **row)
            if step == start:
                log.info("rl: %s", in_figures(job, packs, num_bytes), extra={"step": step})
        end = log_book.note(step, row)
        log_book.keep_best(learner, step + 1, rollouts, config["start"])
        if end:
            log.info("rl: ends early: %s", end, extra={"step": step})
            break
        is_due = (step + 1) % job.learner.steps_per_checkpoint == 0 and step + 1 < job.rl.steps
        if departures.any_new() or is_due:
            seconds = job.learner.deadline_seconds
            safe_step = keep(learner, step + 1, seconds, next_problem=next_problem)
            ray.get(desk.queue.forget_before.remote(safe_step), timeout=seconds)
    learner.export(folder / "rl" / "export", config["start"])
    if tracker:
        tracker.close()
    return {"steps": step + 1, "problems": next_problem, "ended_early": end}


class Desk:
    """A rank's side of board and queue. It keeps what it published last, so that a board which has
    died can be told again."""

    def __init__(self, job: Job, board: Any, queue: Any, learner: Learner) -> None:
        self.queue = queue
        self._job, self._board, self._learner = job, board, learner
        self._rank, self._num_ranks = rank_and_count()
        self._publisher = Publisher(self._rank, job.weights.bucket_mib, job.weights.full_every)
        self._shares: list[Share] = []
        self._next_problem = 0
        self._attempt: str = from_first_rank(uuid.uuid4().hex)

    def publish(self, version: int, next_problem: int) -> int:
        """Put this rank's part of the weights into the store and announce it; returns the bytes."""
        is_wanted_full = self._wish(version) == "full"
        return self._publish(version, next_problem, is_wanted_full)

    def take(self, step: int) -> Rollouts:
        """The rollouts of a step.

        Raises:
            TimeoutError: they did not come within `learner.deadline_seconds`.
            Closed: they will not come, since the rollouts failed; says why.
        """
        seconds = self._job.learner.deadline_seconds
        end = time.monotonic() + seconds
        while True:
            try:
                rollouts: Rollouts = take(self.queue, step, min(LOOK_SECONDS, seconds))
                return rollouts
            except TimeoutError as error:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"rollouts of step {step} did not come within {seconds:.0f} s"
                        " (learner.deadline_seconds)"
                    ) from error
            self._say_again()

    def _say_again(self) -> None:
        """Do what the board wishes, if it wishes anything."""
        newest = self._shares[-1].version
        wish = self._wish(newest)
        # Ranks that say two versions again could miss each other for ever: one whole version.
        if wish == "full" or (wish == "again" and len(self._shares) > 1):
            self._publish(newest, self._next_problem, full=True)
        elif wish == "again":
            self._announce(self._shares[0])

    def _publish(self, version: int, next_problem: int, full: bool) -> int:
        partitions, lora = self._learner.partitions(), self._job.learner.lora
        if lora is not None:
            partitions = adapter_partitions(partitions, lora.alpha / lora.rank)
        share = self._publisher.publish(partitions, version, full)
        # What is kept here stays in the store: no more than an engine needs that is one behind.
        self._shares = [old for old in self._shares if old.version == share.base_version]
        self._shares.append(share)
        self._next_problem = next_problem
        self._announce(share)
        return share.num_bytes

    def _announce(self, share: Share) -> None:
        call = self._board.announce.remote(
            share, self._num_ranks, self._next_problem, self._attempt
        )
        ray.get(call, timeout=self._job.weights.deadline_seconds)

    def _wish(self, version: int) -> str:
        return ray.get(self._board.wish.remote(version), timeout=GRACE_SECONDS)


class Probes:
    """The learner's log-probs of the probe under its last weights, beside the generators'."""

    def __init__(self, job: Job, learner: Learner) -> None:
        self._job, self._learner = job, learner
        self._ours: dict[int, list[np.ndarray]] = {}

    def check(self, step: int, rollouts: Rollouts) -> float | None:
        """Largest difference, in nats, over the loads of weights that rollouts tell of; None where
        there is none that this learner can judge. Every rank scores all of the probe, so that none
        has to tell the others.

        Raises:
            RuntimeError: it is too large: the two sides do not hold the same weights.
        """
        if rollouts.probe:
            self._ours[step] = self._logprobs(rollouts.probe)
        for version in [v for v in self._ours if v < step - self._job.rl.max_staleness - 1]:
            del self._ours[version]
        largest = None
        for version, theirs in rollouts.probed:
            if version not in self._ours:
                continue
            pairs = zip(self._ours[version], theirs, strict=True)
            gap = max(float(np.abs(one - other).max()) for one, other in pairs)
            largest = max(gap, largest or 0.0)
            if not gap <= self._job.weights.max_probe_gap:
                raise RuntimeError(
                    f"step {step}: generator and learner differ by {gap:.2e} nats on the probe"
                    f" under weights version {version}; expected at most"
                    f" weights.max_probe_gap = {self._job.weights.max_probe_gap}"
                )
        return largest

    def _logprobs(self, probe: Sequence[TrainingSequence]) -> list[np.ndarray]:
        # By place, not by problem: a sequence is known by its number.
        numbered = [replace(sequence, origin=str(n)) for n, sequence in enumerate(probe)]
        batches: list[TrainingBatch] = pack(numbered, 1, self._job.learner.tokens_per_pack)[0]
        found: dict[int, np.ndarray] = {}
        for batch, logprobs in zip(batches, self._learner.logprobs(batches), strict=True):
            owners = batch.sequence_ids_T[batch.trainable_T]
            for place, origin in enumerate(batch.origins):
                found[int(origin)] = logprobs[owners == place]
        return [found[number] for number in range(len(probe))]


class LogBook:
    """The rows of a run so far: what is to be said of them, and which weights were best."""

    def __init__(self, job: Job, folder: Path, first_step: int) -> None:
        self._every, self._home = job.rl.steps_per_evaluation, folder / "rl"
        self._num_steps = job.rl.steps
        self._warnings, self._ends = warnings_of(job), ends_of(job)
        self._last_said: dict[type, int] = {}
        self._rank, _ = rank_and_count()
        # One rank reads for all: they must come to the same, and it has taken away what was torn.
        rows = from_first_rank(rows_of(folder) if self._rank == 0 else [])
        self._rows = [row for row in rows if row["step"] < first_step]

    def note(self, step: int, row: dict[str, Any]) -> str | None:
        """Add a step's row. Says what is to be warned of, and returns why the run should end, if
        it should; all ranks come to the same."""
        self._rows.append({"step": step, **row})
        for rule in self._warnings:
            is_fresh = step >= self._last_said.get(type(rule), -STEPS_OF_SILENCE) + STEPS_OF_SILENCE
            if is_fresh and (text := rule(self._rows)):
                self._last_said[type(rule)] = step
                if self._rank == 0:
                    log.warning("rl: %s", text, extra={"step": step})
        return next((text for rule in self._ends if (text := rule(self._rows))), None)

    def keep_best(self, learner: Learner, version: int, rollouts: Rollouts, start: str) -> None:
        """Export weights that are going to be evaluated, and of those that were keep the best by
        pass@1, as RUN/rl/best."""
        candidates = self._home / "evaluated"
        is_due = self._every and version % self._every == 0 and version < self._num_steps
        if is_due:
            learner.export(candidates / str(version), start)
        if self._rank > 0:
            return
        known = [row["pass_at_1"] for row in self._rows[:-1] if "pass_at_1" in row]
        for evaluated, numbers in sorted(rollouts.evaluations.items()):
            found = candidates / str(evaluated)
            if found.exists() and numbers["pass_at_1"] > max(known, default=-1.0):
                shutil.rmtree(self._home / "best", ignore_errors=True)
                found.rename(self._home / "best")
            known.append(numbers["pass_at_1"])
            for old in candidates.glob("*"):
                if int(old.name) <= evaluated:
                    shutil.rmtree(old)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What the stage has written of its steps so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["stage"] == "rl"]


def from_first_rank(value: Any) -> Any:
    """The same on all ranks: what the first one has."""
    held = [value]
    torch.distributed.broadcast_object_list(held)
    return held[0]


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


def refuse_stale(job: Job, step: int, rollouts: Rollouts) -> None:
    """Raises RuntimeError where a token is older than rl.max_staleness allows."""
    lag = rollouts.numbers["staleness_max"]
    if lag > job.rl.max_staleness:
        raise RuntimeError(
            f"step {step}: a token was sampled {lag:.0f} steps before; expected at most"
            f" rl.max_staleness = {job.rl.max_staleness}"
        )


def evaluation_numbers(rollouts: Rollouts) -> dict[str, float]:
    """What was evaluated since the last step, the newest version of it."""
    if not rollouts.evaluations:
        return {}
    newest = max(rollouts.evaluations)
    return {"evaluated_version": newest, **rollouts.evaluations[newest]}


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
