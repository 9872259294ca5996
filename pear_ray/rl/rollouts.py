"""The generators' side: problems in, judged groups of answers out, whatever dies on the way.

What this process has heard of is safe while it lives; what it has not is asked again. Engines,
verifiers, queue and board may be killed at any moment: they are started again, unfinished problems
are issued anew, and what the queue lost is put there again.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any

import numpy as np
import ray

from pear_ray.data.batch_queue import GRACE_SECONDS, QueueState
from pear_ray.engines.engine_factory import engine_pool
from pear_ray.engines.engine_pool import EnginePool
from pear_ray.engines.generator import ScoreRequest
from pear_ray.records import RolloutGroup, TrainingSequence
from pear_ray.rewards.pool import RewardPool
from pear_ray.rl.evaluation import Evaluation
from pear_ray.rl.recording import Recorder
from pear_ray.rl.reference import NoReference, Reference
from pear_ray.rl.scheduler import StepBatch, batch_metrics
from pear_ray.rl.stage import RolloutStage
from pear_ray.weights.registry import PublishedVersions
from pear_ray.weights.types import WeightVersion

log = logging.getLogger(__name__)

NUM_PROBES = 8
# Longest time between two looks at queue and board, in seconds.
LOOK_SECONDS = 1.0
# Python's thresholds, of which the first is 700 unless told: new objects before a search.
GC_THRESHOLDS = (50_000, 20, 20)


@dataclass(frozen=True)
class RolloutBatch:
    """Everything that generators hand over for one learner step.

    `probe` are fixed answers; `probed` holds, for each load of weights since the last step, the
    version and the engine's log-probs of the probe under it (float32 [response tokens] each), so
    that the learner can check that both sides hold the same weights. `evaluations` are pass@1 by
    version. `numbers` are the sampling side's metrics.
    """

    batch: StepBatch
    probe: tuple[TrainingSequence, ...]
    probed: tuple[tuple[int, tuple[np.ndarray, ...]], ...]
    evaluations: dict[int, dict[str, float]]
    numbers: dict[str, float]


class VersionWatcher:
    """The newest weights, without waiting for them."""

    def __init__(self, versions_actor: Any, cursor: str) -> None:
        self._board, self._mark = versions_actor, cursor
        self.call = versions_actor.newest.remote(cursor, LOOK_SECONDS)

    def news(self) -> PublishedVersions | None:
        """What was announced since the last call, if anything was."""
        if not is_ready(self.call):
            return None
        announced: PublishedVersions | None = ray.get(self.call)
        if announced is not None:
            self._mark = announced.cursor
        self.call = self._board.newest.remote(self._mark, LOOK_SECONDS)
        return announced


class BatchSender:
    """Rollouts on their way to the learners. It keeps a reference to each step's until no learner
    can ask for it again, and puts them there anew when the queue has died."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._kept: dict[int, Any] = {}
        self._state: QueueState | None = None
        self._asked = time.monotonic()
        self.call = queue.state.remote()

    def put(self, rollouts: RolloutBatch) -> None:
        """Hand over one step's."""
        step = rollouts.batch.step
        self._kept[step] = ray.put(rollouts)
        self._queue.put.remote(step, [self._kept[step]])

    def look_after(self) -> bool:
        """Notice what became of the queue; returns whether a learner waits."""
        if is_ready(self.call) and time.monotonic() > self._asked + LOOK_SECONDS:
            before, self._state = self._state, ray.get(self.call)
            assert self._state is not None
            for step in [step for step in self._kept if step < self._state.first_needed]:
                del self._kept[step]
            if before is not None and before.name != self._state.name:
                for step, reference in self._kept.items():
                    self._queue.put.remote(step, [reference])
            self.call, self._asked = self._queue.state.remote(), time.monotonic()
        return self._state is not None and self._state.is_awaited

    @property
    def newest_taken(self) -> int:
        """The latest step that learners are known to have taken; -1: none."""
        taken = None if self._state is None else self._state.newest_taken
        return -1 if taken is None else taken


class ParityProbe:
    """Fixed answers, which every engine scores after every load of weights."""

    def __init__(self, pool: EnginePool, timeout_seconds: float) -> None:
        self._pool, self._deadline_seconds = pool, timeout_seconds
        self._sequences: tuple[TrainingSequence, ...] = ()
        self._idle_before = 0.0
        self._since = time.monotonic()

    def serve(self, versions: tuple[WeightVersion, ...]) -> None:
        """Have the engines serve these weights."""
        traces = [trace_of(sequence) for sequence in self._sequences]
        self._pool.serve(versions, traces, self._deadline_seconds)

    def rollouts(self, batch: StepBatch, evaluations: dict[int, dict[str, float]]) -> RolloutBatch:
        """A lesson with what was measured since the last one. One answer to each of the first
        problems is the probe of the whole run."""
        loads, self._pool.loaded = self._pool.loaded, []
        now, idle = time.monotonic(), self._pool.idle_seconds
        numbers = batch_metrics(batch) | {
            "pause_seconds": max((load.pause_seconds for _, load in loads), default=0.0),
            "fetch_seconds": max(
                (load.fetch_seconds + load.prepare_seconds for _, load in loads), default=0.0
            ),
            "engine_idle_seconds": (idle - self._idle_before) / self._pool.num_engines,
            "rollout_seconds": now - self._since,
            "num_engines": self._pool.num_engines,
        }
        self._idle_before, self._since = idle, now
        probed = tuple((load.version, load.probe) for _, load in loads if load.probe)
        if not self._sequences:
            self._sequences = tuple(map(first_answer, batch.groups[:NUM_PROBES]))
        return RolloutBatch(batch, self._sequences, probed, evaluations, numbers)

    def look_after(self, versions_actor: Any, tell: Callable[[str, str], None]) -> bool:
        """Ask for whole weights where an engine could not load what there was; returns whether one
        could not."""
        failed, self._pool.failed_loads = self._pool.failed_loads, []
        for name, error in failed:
            tell("load_failed", f"engine {name} could not load weights: {error}")
            versions_actor.request_full.remote()
        return bool(failed)


def run_rollouts(stage: RolloutStage, versions_actor: Any, queue: Any, ended: Event) -> None:
    """Answer problem after problem until the learners have ended."""
    job, start, tell = stage.job, stage.start, partial(stage.run.event, stage.name)
    referee = Reference(engine_pool(job, start, tell)) if job.rl.kl_coefficient else NoReference()
    with (
        referee as reference,
        engine_pool(job, start, tell, stage.replica) as pool,
        RewardPool(job.tasks, job.rewards) as reward_pool,
    ):
        pool.wait_ready()
        reference.wait_ready()
        answer(stage, pool, reference, reward_pool, versions_actor, queue, ended)


@contextmanager
def infrequent_gc() -> Iterator[None]:
    """A step's answers are many small objects that live until they are handed over, in no cycle:
    to search them as often as Python does unasked is a fifth of the loop's time."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@infrequent_gc()
def answer(
    stage: RolloutStage,
    pool: EnginePool,
    reference: Reference | NoReference,
    reward_pool: RewardPool,
    versions_actor: Any,
    queue: Any,
    ended: Event,
) -> None:
    """Engines, verifiers and learners brought together. Nothing here waits but for whatever comes
    next; how far it may run ahead of the learners, `Course` says."""
    job, start = stage.job, stage.start
    news: PublishedVersions | None = first_announced(
        versions_actor, job.learner.timeout_seconds, ended
    )
    if news is None:
        return
    scheduler = stage.scheduler(job, start, news.versions[-1].version, news.next_problem)
    evaluation, recorder = Evaluation(job, start), Recorder(job, stage.folder, start)
    watch, handover = VersionWatcher(versions_actor, news.cursor), BatchSender(queue)
    probe = ParityProbe(pool, job.weights.timeout_seconds)
    version = -1
    while not ended.is_set():
        # First, for what is due may depend on verdicts.
        for key, grades in reward_pool.finished(0.0):
            (evaluation if evaluation.has(key) else scheduler).add_rewards(key, grades)
        while (batch := scheduler.pop_batch()) is not None:
            rollouts = probe.rollouts(batch, evaluation.finished())
            recorder.keep(batch)
            handover.put(rollouts)
            log.info(in_words(stage, rollouts), extra={"step": batch.step})
        news = watch.news() or news
        if news is not None and not evaluation.is_running:
            versions = evaluation.up_to(news.versions)
            probe.serve(versions)
            news = None if versions == news.versions else news
            version = max(version, versions[-1].version)
            pool.submit(evaluation.next_requests(version))
        if not evaluation.is_running:
            pool.submit(scheduler.next_requests(version))
        for key, pairs in scheduler.take_prefilled():
            reward_pool.submit(key, pairs)
        for key, answers in pool.finished():
            if evaluation.has(key):
                reward_pool.submit(key, evaluation.add_completions(key, answers))
            else:
                reference.submit(key, scheduler.prompt_ids(key), answers)
        for key, answers in reference.finished():
            reward_pool.submit(key, scheduler.add_completions(key, answers))
        if probe.look_after(versions_actor, partial(stage.run.event, stage.name)):
            # Engines wait for weights that can be loaded, of another version perhaps.
            evaluation.abandon()
        pool.autoscale(handover.look_after())
        calls = [*pool.calls, *reference.calls, *reward_pool.calls, watch.call]
        ray.wait(calls, timeout=LOOK_SECONDS, fetch_local=False)


def first_announced(
    versions_actor: Any, timeout_seconds: float, ended: Event
) -> PublishedVersions | None:
    """What the learners start from; None where they end before they say so.

    Raises:
        TimeoutError: they say nothing in time.
    """
    end = time.monotonic() + timeout_seconds
    while not ended.is_set():
        call = versions_actor.newest.remote(None, LOOK_SECONDS)
        if (announced := ray.get(call, timeout=LOOK_SECONDS + GRACE_SECONDS)) is not None:
            return announced
        if time.monotonic() > end:
            raise TimeoutError(
                f"waited {timeout_seconds:.0f} s (learner.timeout_seconds) for the learners'"
                " first weights"
            )
    return None


def first_answer(group: RolloutGroup) -> TrainingSequence:
    """The first answer of a group as a sequence to be scored, all of it, whoever began it."""
    answer = group.completions[0]
    return TrainingSequence.of(
        group.prompt_ids,
        answer.trace_ids + answer.token_ids,
        answer.trace_logprobs + answer.logprobs,
        1.0,
        group.problem_id,
    )


def trace_of(sequence: TrainingSequence) -> ScoreRequest:
    """The same, for an engine."""
    ids, trainable = sequence.token_ids, sequence.trainable
    return ScoreRequest(tuple(ids[~trainable].tolist()), tuple(ids[trainable].tolist()))


def in_words(stage: RolloutStage, rollouts: RolloutBatch) -> str:
    """One step's rollouts on a line that fits a terminal."""
    numbers = rollouts.numbers
    evaluated = "".join(
        f", pass@1 of version {version} {found['pass_at_1']:.3f}"
        for version, found in rollouts.evaluations.items()
    )
    return (
        f"{stage.name}: step {rollouts.batch.step + 1} of {stage.job.rl.steps}: pass rate"
        f" {numbers['pass_rate']:.3f}, {numbers['completions_mean_length']:.1f} tokens an answer,"
        f" {numbers['rollout_seconds']:.1f} s{evaluated}"
    )


def is_ready(call: Any) -> bool:
    """Whether a call has ended, well or not."""
    ready, _ = ray.wait([call], timeout=0, fetch_local=False)
    return bool(ready)
