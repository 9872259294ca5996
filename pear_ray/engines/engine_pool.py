"""A pool of vLLM engine actors with least-loaded dispatch, autoscaling, and replacement of engines that die or whose
node drains."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

from pear_ray.config import Job
from pear_ray.engines.engine_actor import EngineActor, MakeCache, WeightUpdateResult
from pear_ray.engines.generator import Generator, Request, ScoreRequest, same_architecture
from pear_ray.weights.fetch import WeightCache
from pear_ray.weights.registry import WeightVersion

POLL_SECONDS = 10.0  # longest time an engine holds a poll open without results
GRACE_SECONDS = 30.0  # an engine counts as dead if a poll is overdue by its timeouts and this
MAX_ATTEMPTS = 20  # a request is not resubmitted after this number of engines died with it in flight
IDLE_SECONDS = 60.0  # an engine beyond `min_engines` is stopped after the pool was idle this long
DRAIN_CHECK_SECONDS = 2.0  # spot nodes drain with a notice of 30 to 120 s
MAX_DEATHS = 5  # consecutive deaths of engines that had not finished a request
MAX_FAILED_UPDATES = 5


@dataclass
class InFlight:
    """A request that is not finished; `num_attempts` counts the engines it was sent to."""

    key: Hashable
    request: Request
    num_attempts: int = 0


@dataclass(eq=False)
class EngineHandle:
    """The pool's record of one engine actor."""

    number: int
    actor: Any
    is_ready: bool = False
    node_id: str = ""
    has_finished_any: bool = False
    num_failed_updates: int = 0  # in a row
    polled_at: float = 0.0  # start of the open poll, in `time.monotonic()` seconds
    is_updating: bool = False
    requested_version: int = -1  # newest weight version the engine was asked to load
    in_flight: dict[str, InFlight] = field(default_factory=dict)
    num_sequences: int = 0  # unfinished sequences of all requests in flight
    idle_seconds: float = 0.0


class EnginePool(AbstractContextManager["EnginePool"]):
    """Between `generator.min_engines` and `generator.num_engines` engines, stopped on exit.

    The constructor starts them with the model in `path` and does not wait. `log_event(kind, text)` records deaths,
    preemptions and scaling. `make_cache()` builds the cache through which an engine fetches weight versions; None: the
    engines follow no learner.
    """

    def __init__(
        self, job: Job, path: str, log_event: Callable[[str, str], None], make_cache: MakeCache | None = None
    ) -> None:
        self._job = job
        self._settings = job.generator
        self._path = path
        self._make_cache = make_cache
        self._log_event = log_event
        self._engines: dict[int, EngineHandle] = {}
        # Callbacks of actor calls that have not ended.
        self._calls: dict[Any, tuple[EngineHandle, Callable[[EngineHandle, Any], None]]] = {}
        self._finished: list[tuple[Hashable, Any]] = []
        self._backlog: deque[InFlight] = deque()
        # Arguments of the latest `update_weights`.
        self._update_arguments: tuple[tuple[WeightVersion, ...], Sequence[ScoreRequest], float] | None = None
        self._was_ready = False
        self._num_started = 0
        self._num_deaths = 0
        self._num_dispatched = 0
        self._num_folders_loaded = 0
        self._busy_at = time.monotonic()
        self._drain_checked_at = time.monotonic()
        # Idle time of all engines together since the start.
        self.idle_seconds = 0.0
        # By engine number; cleared by the caller.
        self.weight_updates: list[tuple[int, WeightUpdateResult]] = []
        self.failed_updates: list[tuple[int, Exception]] = []
        for _ in range(job.generator.min_engines):
            self._start()

    def __exit__(self, *error: object) -> None:
        for engine in self._engines.values():
            ray.kill(engine.actor)
        self._engines.clear()
        self._calls.clear()

    @property
    def pending_calls(self) -> list[Any]:
        """Return the references to wait for before `pop_finished`."""
        return list(self._calls)

    @property
    def num_sequences(self) -> int:
        """Return the number of unfinished sequences."""
        waiting = sum(item.request.num_samples for item in self._backlog)
        return waiting + sum(engine.num_sequences for engine in self._engines.values())

    @property
    def num_engines(self) -> int:
        """Return the number of engines that are ready or starting."""
        return len(self._engines)

    def submit(self, requests: Sequence[tuple[Hashable, Request]]) -> None:
        """Queue (key, request) pairs; `pop_finished` returns each result once, under its key."""
        self._backlog.extend(InFlight(key, request) for key, request in requests)
        self._dispatch()

    def pop_finished(self) -> list[tuple[Hashable, Any]]:
        """Return the (key, result) pairs finished since the last call, as of `Generator.step`; does not wait.

        Replaces engines that died. Raises RuntimeError if they died in a row or with the same request in flight, or the
        error of an engine that failed to start or refused a request.
        """
        self._advance()
        finished, self._finished = self._finished, []
        for _, result in finished:
            if isinstance(result, Exception):
                raise result
        return finished

    def _advance(self) -> None:
        calls = list(self._calls)
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
        for call in ready:
            engine, callback = self._calls.pop(call)
            if engine.number not in self._engines:
                continue
            try:
                callback(engine, call)
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                # The result may be lost with its node.
                self._replace(engine, str(error))
        latest = time.monotonic() - POLL_SECONDS - self._settings.timeout_seconds - GRACE_SECONDS
        for engine in [engine for engine in self._engines.values() if engine.is_ready and engine.polled_at < latest]:
            self._replace(engine, "no answer in time (generator.timeout_seconds)")
        if time.monotonic() >= self._drain_checked_at + DRAIN_CHECK_SECONDS:
            self._drain_checked_at = time.monotonic()
            # Nodes that are preempted, or drained by an autoscaler; Ray Train uses the same source.
            node_ids = set(ray._private.state.state.get_draining_nodes())
            for engine in [engine for engine in self._engines.values() if engine.node_id in node_ids]:
                text = f"engine {engine.number} stopped, its node drains: {len(engine.in_flight)} requests resubmitted"
                self._log_event("preempted", text)
                self._stop(engine)
                self._start()
        self._dispatch()

    def update_weights(
        self, versions: tuple[WeightVersion, ...], parity_requests: Sequence[ScoreRequest], timeout_seconds: float
    ) -> None:
        """Ask every engine to load the last of `versions`, then score `parity_requests` with it; does not wait.

        Results arrive in `weight_updates` and `failed_updates`. After `MAX_FAILED_UPDATES` of one engine in a row
        `pop_finished` raises RuntimeError.
        """
        self._update_arguments = versions, tuple(parity_requests), timeout_seconds
        for engine in self._engines.values():
            self._update(engine)

    def load_folder(self, path: str) -> None:
        """Serve the model in `path` from every engine; no request may be in flight. Engines restart if its architecture
        differs from that of the current model. TimeoutError if one does not load it in time."""
        self.wait_ready()
        loads_in_place = same_architecture(self._path, path)
        self._path = path
        engines = list(self._engines.values())
        if not loads_in_place:
            for engine in engines:
                self._stop(engine)
                self._start()
            return
        self._num_folders_loaded += 1
        calls = [engine.actor.load_folder.remote(path, self._num_folders_loaded) for engine in engines]
        deadline = time.monotonic() + self._settings.timeout_seconds
        for engine, call in zip(engines, calls, strict=True):
            engine.requested_version = -1
            try:
                ray.get(call, timeout=deadline - time.monotonic())
            except ray.exceptions.RayActorError as error:
                # Its replacement starts with this model.
                self._replace(engine, str(error))

    def autoscale(self, is_awaited: bool) -> None:
        """Start an engine if results are awaited and all engines are full, or stop an idle one."""
        settings, num_engines, now = self._settings, len(self._engines), time.monotonic()
        all_ready = all(engine.is_ready for engine in self._engines.values())
        is_full = self.num_sequences > num_engines * settings.max_num_seqs
        if self.num_sequences:
            self._busy_at = now
        if is_awaited and is_full and all_ready and num_engines < settings.num_engines:
            self._log_event("grown", f"engine {self._start().number} started: requests wait")
        elif now > self._busy_at + IDLE_SECONDS and num_engines > settings.min_engines:
            engine = list(self._engines.values())[-1]
            self._stop(engine)
            self._busy_at = now
            self._log_event("shrunk", f"engine {engine.number} stopped: it was idle")

    def wait_ready(self) -> None:
        """Wait until all engines are ready, or raise TimeoutError."""
        timeout_seconds = self._settings.timeout_seconds
        deadline = time.monotonic() + timeout_seconds
        while not all(engine.is_ready for engine in self._engines.values()):
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                raise TimeoutError(f"engines not ready within {timeout_seconds:.0f} s (generator.timeout_seconds)")
            ray.wait(self.pending_calls, timeout=seconds_left, fetch_local=False)
            self._advance()

    def generate(self, requests: Sequence[Request]) -> list[Any]:
        """Return the results in the order of `requests`; raises as `stream`."""
        results = dict(self.stream(requests))
        return [results[number] for number in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Any]]:
        """Yield (index of the request, result) as requests finish; TimeoutError if none does for `timeout_seconds`."""
        self.wait_ready()
        timeout_seconds = self._settings.timeout_seconds
        # Distinguishes these keys from those of an abandoned stream.
        stream_id = object()
        missing: dict[Hashable, int] = {(stream_id, number): number for number in range(len(requests))}
        self.submit(list(zip(missing, requests, strict=True)))
        deadline = time.monotonic() + timeout_seconds
        while missing:
            if time.monotonic() > deadline:
                text = f"none of {len(missing)} requests finished within {timeout_seconds:.0f} s"
                raise TimeoutError(f"{text} (generator.timeout_seconds)")
            ray.wait(self.pending_calls, timeout=1.0, fetch_local=False)
            for key, result in self.pop_finished():
                deadline = time.monotonic() + timeout_seconds
                if key in missing:
                    yield missing.pop(key), result

    def _start(self) -> EngineHandle:
        engine = EngineHandle(self._num_started, self._start_actor())
        self._num_started += 1
        self._engines[engine.number] = engine
        self._calls[engine.actor.ready.remote()] = engine, self._on_ready
        return engine

    def _start_actor(self) -> Any:
        job, settings = self._job, self._settings
        if settings.num_gpus == 0:
            # No chunked prefill: see `Generator`.
            batch_tokens = max(settings.max_num_batched_tokens, settings.max_model_len + 1)
            settings = settings.model_copy(update={"max_num_batched_tokens": batch_tokens})
        make_engine = partial(
            Generator, self._path, job.model.dtype, settings, job.run.seed, follows_learner=self._make_cache is not None
        )
        actor_class = EngineActor.options(  # type: ignore[attr-defined]
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_actor_gpus,
            label_selector=dict(job.placement.generators),
            max_concurrency=1000,
        )
        return actor_class.remote(make_engine, self._make_cache or WeightCache, settings.timeout_seconds)

    def _on_ready(self, engine: EngineHandle, call: Any) -> None:
        try:
            engine.node_id = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            if not self._was_ready:
                raise
            # An engine of this kind did start before: the cause may be transient.
            self._replace(engine, str(error))
            return
        engine.is_ready = True
        self._was_ready = True
        self._poll(engine)
        self._update(engine)

    def _poll(self, engine: EngineHandle) -> None:
        engine.polled_at = time.monotonic()
        self._calls[engine.actor.poll.remote(POLL_SECONDS)] = engine, self._on_poll

    def _on_poll(self, engine: EngineHandle, call: Any) -> None:
        poll = ray.get(call)
        self.idle_seconds += poll.idle_seconds - engine.idle_seconds
        engine.idle_seconds = poll.idle_seconds
        for key, result in poll.finished:
            item = engine.in_flight.pop(key)
            engine.num_sequences -= item.request.num_samples
            self._finished.append((item.key, result))
            self._num_deaths = 0
            engine.has_finished_any = True
        self._poll(engine)

    def _update(self, engine: EngineHandle) -> None:
        if self._update_arguments is None or not engine.is_ready or engine.is_updating:
            return
        newest = self._update_arguments[0][-1].version
        if engine.requested_version >= newest:
            return
        self._calls[engine.actor.update_weights.remote(*self._update_arguments)] = engine, self._on_update
        engine.is_updating = True
        engine.requested_version = newest

    def _on_update(self, engine: EngineHandle, call: Any) -> None:
        engine.is_updating = False
        try:
            self.weight_updates.append((engine.number, ray.get(call)))
        except ray.exceptions.RayTaskError as error:
            # The engine keeps its old weights until the next `update_weights`.
            engine.requested_version = -1
            self.failed_updates.append((engine.number, error.cause))
            engine.num_failed_updates += 1
            if engine.num_failed_updates == MAX_FAILED_UPDATES:
                text = f"engine {engine.number} failed to update its weights {MAX_FAILED_UPDATES} times in a row"
                raise RuntimeError(f"{text}: {error.cause}") from error
            return
        engine.num_failed_updates = 0
        self._update(engine)

    def _stop(self, engine: EngineHandle) -> None:
        del self._engines[engine.number]
        ray.kill(engine.actor)
        self._backlog.extendleft(reversed(engine.in_flight.values()))

    def _replace(self, engine: EngineHandle, reason: str) -> None:
        self._num_deaths += not engine.has_finished_any
        text = f"engine {engine.number} died, {len(engine.in_flight)} requests resubmitted: {reason}"
        self._log_event("died", text)
        exhausted = [item.key for item in engine.in_flight.values() if item.num_attempts >= MAX_ATTEMPTS]
        if exhausted:
            raise RuntimeError(f"{MAX_ATTEMPTS} engines died over request {exhausted[0]}; {text}")
        if self._num_deaths > MAX_DEATHS:
            raise RuntimeError(f"{self._num_deaths} engines died before any result; {text}")
        self._stop(engine)
        self._start()

    def _dispatch(self) -> None:
        # To the least loaded engines, with one call each.
        ready = [(engine.num_sequences, engine.number, engine) for engine in self._engines.values() if engine.is_ready]
        if not ready:
            return
        heapq.heapify(ready)
        batches: dict[int, list[tuple[str, Request]]] = {}
        while self._backlog:
            item = self._backlog.popleft()
            _, number, engine = ready[0]
            self._num_dispatched += 1
            item.num_attempts += 1
            key = str(self._num_dispatched)
            engine.in_flight[key] = item
            engine.num_sequences += item.request.num_samples
            batches.setdefault(number, []).append((key, item.request))
            heapq.heapreplace(ready, (engine.num_sequences, number, engine))
        for number, batch in batches.items():
            self._engines[number].actor.submit.remote(batch)
