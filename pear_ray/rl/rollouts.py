"""The parts of the generator side: engines and reward workers, weights in, batches out.

State in this process is safe while it lives; anything in flight elsewhere may be lost. Engines, reward workers, queue
and registry can be killed at any moment: they restart, unfinished prompts are submitted again, and batches that the
queue lost are sent again.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import ray

from pear_ray.config import Job
from pear_ray.data.batch_queue import GRACE_SECONDS, BatchQueue, QueueState
from pear_ray.engines.engine_actor import WeightUpdateResult
from pear_ray.engines.engine_pool import EnginePool
from pear_ray.engines.generator import SampleRequest, ScoreRequest
from pear_ray.records import Completion, RolloutGroup, TrainingSequence
from pear_ray.rewards.pool import RewardPool
from pear_ray.rl.evaluation import Evaluation
from pear_ray.rl.scheduler import RolloutScheduler, StepBatch, batch_metrics
from pear_ray.run import RunDir, this_node_only
from pear_ray.weights.adapters import AdapterCache
from pear_ray.weights.fetch import WeightCache
from pear_ray.weights.registry import PolicyVersions, PublishedVersions

log = logging.getLogger(__name__)

# Longest wait before the loop polls queue and registry again.
POLL_SECONDS = 1.0
# Allocations before a collection of each generation; Python's default is (700, 10, 10).
GC_THRESHOLDS = (50_000, 20, 20)
# Completions that engines and learner score throughout the run, one for each of the first problems.
NUM_PARITY_SEQUENCES = 8


@dataclass(frozen=True)
class RolloutStage:
    """A stage that trains on rollouts, beginning with the model `start_model` (folder or hub name).

    `make_scheduler(job, start_model, first_step, first_problem)` decides which prompts are sampled and which groups a
    step trains on; `make_weight_cache()` receives weights in an engine.
    """

    job: Job
    run: RunDir
    name: str
    start_model: str
    make_scheduler: Callable[[Job, str, int, int], RolloutScheduler] = RolloutScheduler
    make_weight_cache: Callable[[], WeightCache] = WeightCache

    @classmethod
    def of(cls, job: Job, run: RunDir, name: str) -> RolloutStage:
        """Return the stage that starts from the export of `sft`, or else from the job's model. If only adapters are
        trained, only adapters are published."""
        export = run.folder / "sft" / "export"
        start_model = str(export if export.exists() else job.model_path())
        make_cache = WeightCache if job.learner.lora is None else partial(AdapterCache, start_model)
        return cls(job, run, name, start_model, make_weight_cache=make_cache)

    @property
    def folder(self) -> Path:
        """Return the stage's output folder."""
        return self.run.folder / self.name


@dataclass(frozen=True)
class Link:
    """The actors between the two sides, and whether the learners have finished."""

    registry: Any
    queue: Any
    finished: Event

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[Link]:
        """Start registry and queue; when the block ends, the generator side ends."""
        # Ray restarts them if they die, and repeats the calls to them.
        options: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": this_node_only()}
        registry = PolicyVersions.options(**options).remote()  # type: ignore[attr-defined]
        queue = BatchQueue.options(**options).remote()  # type: ignore[attr-defined]
        link = cls(registry, queue, Event())
        try:
            yield link
        finally:
            link.finished.set()
            with suppress(ray.exceptions.RayError):
                ray.get(registry.close.remote("the learners have ended"), timeout=GRACE_SECONDS)

    @contextmanager
    def close_queue_on_error(self) -> Iterator[None]:
        """If the block fails, close the queue, so that waiting learners end too."""
        try:
            yield
        except BaseException as error:
            # Repeatedly, since a queue that restarts is open again.
            while not self.finished.is_set():
                ray.get(self.queue.close.remote(f"the rollouts failed: {error!r}"), timeout=GRACE_SECONDS)
                self.finished.wait(POLL_SECONDS)
            raise

    def wait_first_version(self, timeout_seconds: float) -> PublishedVersions | None:
        """Wait for the version that the learners start from; None if they finish before. Raise TimeoutError if none
        comes in time."""
        deadline = time.monotonic() + timeout_seconds
        while not self.finished.is_set():
            call = self.registry.newest.remote(None, POLL_SECONDS)
            published = ray.get(call, timeout=POLL_SECONDS + GRACE_SECONDS)
            if published is not None:
                return published
            if time.monotonic() > deadline:
                raise TimeoutError(
                    "learner.timeout_seconds: expected the learners' first weights within"
                    f" {timeout_seconds:.0f} s, got none"
                )
        return None


@dataclass(frozen=True)
class ReferenceScorer:
    """Adds `reference_logprobs` to completions for a KL penalty: `pool` has engines that keep the weights which RL
    starts from. `pending` holds completions by key, and the log-probs of those scored so far."""

    pool: EnginePool
    pending: dict[Hashable, tuple[tuple[Completion, ...], dict[int, np.ndarray]]] = field(default_factory=dict)

    def submit(self, key: Hashable, prompt_ids: tuple[int, ...], completions: tuple[Completion, ...]) -> None:
        """Score the completions of a prompt."""
        self.pending[key] = completions, {}
        for number, completion in enumerate(completions):
            self.pool.submit([((key, number), ScoreRequest(prompt_ids, completion.token_ids))])

    def pop_finished(self) -> Iterator[tuple[Hashable, tuple[Completion, ...]]]:
        """Yield the completions that have all been scored, by key."""
        for place, logprobs in self.pool.pop_finished():
            assert isinstance(place, tuple)
            key, number = place
            completions, scored = self.pending[key]
            scored[number] = logprobs
            if len(scored) == len(completions):
                del self.pending[key]
                with_reference = [
                    replace(completion, reference_logprobs=tuple(scored[n].tolist()))
                    for n, completion in enumerate(completions)
                ]
                yield key, tuple(with_reference)


@dataclass(frozen=True)
class Workers:
    """Everything that works on completions: engines, the reference policy's engines if there is a KL penalty, and
    reward workers."""

    pool: EnginePool
    reference: ReferenceScorer | None
    reward_pool: RewardPool

    @classmethod
    @contextmanager
    def start(cls, stage: RolloutStage) -> Iterator[Workers]:
        """Start all workers and wait until the engines are ready."""
        job, log_event = stage.job, partial(stage.run.event, stage.name)
        start_pool = partial(EnginePool, job, stage.start_model, log_event)
        with (
            start_pool() if job.rl.kl_coefficient else nullcontext() as reference_pool,
            start_pool(stage.make_weight_cache) as pool,
            RewardPool(job.tasks, job.rewards) as reward_pool,
        ):
            pool.wait_ready()
            if reference_pool:
                reference_pool.wait_ready()
            yield cls(pool, ReferenceScorer(reference_pool) if reference_pool else None, reward_pool)

    def wait(self, other_call: Any) -> None:
        """Wait until a call of theirs or `other_call` ends, at most POLL_SECONDS."""
        calls = [*self.pool.pending_calls, *self.reward_pool.pending_calls, other_call]
        if self.reference:
            calls += self.reference.pool.pending_calls
        ray.wait(calls, timeout=POLL_SECONDS, fetch_local=False)


@dataclass(frozen=True)
class RolloutBatch:
    """Everything that the generator side sends to the learners for one step.

    `weight_updates` are the engines' weight updates since the last step, each with the engine's log-probs of
    `parity_sequences`. `evaluations` maps a weight version to its held-out metrics. `metrics` are those of sampling.
    """

    batch: StepBatch
    parity_sequences: tuple[TrainingSequence, ...]
    weight_updates: tuple[WeightUpdateResult, ...]
    evaluations: dict[int, dict[str, float]]
    metrics: dict[str, float]


class BatchSender:
    """Sends batches to the queue and keeps them until no learner can ask for them again, so that they can be sent again
    after the queue has died."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._sent: dict[int, Any] = {}
        self._state: QueueState | None = None
        self._polled_at = time.monotonic()
        self._call = queue.state.remote()
        self.newest_taken = -1
        """Latest step that learners have taken; -1 if none."""

    def send(self, rollouts: RolloutBatch) -> None:
        """Offer the batch of one step."""
        step = rollouts.batch.step
        self._sent[step] = ray.put(rollouts)
        self._queue.put.remote(step, [self._sent[step]])

    def poll(self) -> bool:
        """Send lost batches again, drop those no longer needed; return whether a learner waits."""
        if (
            ray.wait([self._call], timeout=0, fetch_local=False)[0]
            and time.monotonic() > self._polled_at + POLL_SECONDS
        ):
            previous, state = self._state, ray.get(self._call)
            self._sent = {s: batch for s, batch in self._sent.items() if s >= state.first_needed}
            # A queue that restarted has another name and is empty.
            if previous is not None and previous.name != state.name:
                for step, reference in self._sent.items():
                    self._queue.put.remote(step, [reference])
            self._state = state
            self.newest_taken = -1 if state.newest_taken is None else state.newest_taken
            self._call = self._queue.state.remote()
            self._polled_at = time.monotonic()
        return self._state is not None and self._state.is_awaited


class EngineWeights:
    """Moves published weights into the engines and adds their measurements to each batch."""

    def __init__(self, stage: RolloutStage, pool: EnginePool, link: Link, first: PublishedVersions):
        self._stage = stage
        self._pool = pool
        self._registry = link.registry
        self._published: PublishedVersions | None = first
        self._cursor = first.cursor
        self._parity_sequences: tuple[TrainingSequence, ...] = ()
        self._idle_seconds = 0.0
        self._last_batch_at = time.monotonic()
        self.pending_call = self._registry.newest.remote(self._cursor, POLL_SECONDS)
        """Call to wait for before `update`."""
        self.version = -1
        """Newest version that engines were asked to serve."""

    def update(self, evaluation: Evaluation) -> list[tuple[Hashable, SampleRequest]]:
        """Update engines to the newest version, or to the next one to evaluate, unless an evaluation is running; return
        the requests of an evaluation that is due."""
        if ray.wait([self.pending_call], timeout=0, fetch_local=False)[0]:
            newest: PublishedVersions | None = ray.get(self.pending_call)
            if newest is not None:
                self._published, self._cursor = newest, newest.cursor
            self.pending_call = self._registry.newest.remote(self._cursor, POLL_SECONDS)
        if self._published is None or evaluation.is_running:
            return []
        versions = evaluation.up_to(self._published.versions)
        parity_requests = [score_request(sequence) for sequence in self._parity_sequences]
        self._pool.update_weights(versions, parity_requests, self._stage.job.weights.timeout_seconds)
        if versions == self._published.versions:
            self._published = None
        self.version = max(self.version, versions[-1].version)
        return evaluation.next_requests(self.version)

    def recover(self, evaluation: Evaluation) -> None:
        """Request a full version if an engine failed to update."""
        failures, self._pool.failed_updates = self._pool.failed_updates, []
        for name, error in failures:
            text = f"engine {name} failed to update weights: {error}"
            self._stage.run.event(self._stage.name, "load_failed", text)
            self._registry.request_full.remote()
        if failures:
            # Engines now wait for a full version, which may be newer than the evaluated one.
            evaluation.abandon()

    def measure(self, batch: StepBatch, evaluations: dict[int, dict[str, float]]) -> RolloutBatch:
        """Return a batch with the measurements since the last one."""
        updates = [update for _, update in self._pool.weight_updates]
        self._pool.weight_updates = []
        now, idle_seconds = time.monotonic(), self._pool.idle_seconds
        num_engines = self._pool.num_engines
        metrics = batch_metrics(batch) | {
            "pause_seconds": max((update.pause_seconds for update in updates), default=0.0),
            "fetch_seconds": max((update.fetch_seconds + update.prepare_seconds for update in updates), default=0.0),
            "engine_idle_seconds": (idle_seconds - self._idle_seconds) / num_engines,
            "rollout_seconds": now - self._last_batch_at,
            "num_engines": num_engines,
        }
        self._idle_seconds = idle_seconds
        self._last_batch_at = now
        evaluated = "".join(f", pass@1 of version {v} {found['pass_at_1']:.3f}" for v, found in evaluations.items())
        log.info(
            f"{self._stage.name}: step {batch.step + 1} of {self._stage.job.rl.steps}: pass rate"
            f" {metrics['pass_rate']:.3f}, {metrics['completions_mean_length']:.1f} tokens per completion,"
            f" {metrics['rollout_seconds']:.1f} s{evaluated}",
            extra={"step": batch.step},
        )
        self._parity_sequences = self._parity_sequences or parity_sequences(batch.groups)
        scored = tuple(update for update in updates if update.parity_logprobs)
        return RolloutBatch(batch, self._parity_sequences, scored, evaluations, metrics)


def parity_sequences(groups: Sequence[RolloutGroup]) -> tuple[TrainingSequence, ...]:
    """Return the first completion of each of the first groups, demonstration prefixes included."""
    sequences = []
    for group in groups[:NUM_PARITY_SEQUENCES]:
        first = group.completions[0]
        ids, logprobs = first.prefix_ids + first.token_ids, first.prefix_logprobs + first.logprobs
        sequences.append(TrainingSequence.of(group.prompt_ids, ids, logprobs, 1.0, group.problem_id))
    return tuple(sequences)


def score_request(sequence: TrainingSequence) -> ScoreRequest:
    """Return the request with which engines score a parity sequence after each weight update."""
    ids, trainable = sequence.token_ids, sequence.trainable
    return ScoreRequest(tuple(ids[~trainable].tolist()), tuple(ids[trainable].tolist()))


@contextmanager
def rare_gc() -> Iterator[None]:
    """Run the garbage collector rarely: rollouts are many objects without cycles, and Python's default thresholds cost
    20 % of the rollout loop."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
