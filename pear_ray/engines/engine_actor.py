"""A Ray actor around one vLLM engine, which stays responsive while the engine steps."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import ray
from torch import Tensor

from pear_ray.engines.generator import Generator, Request, ScoreRequest
from pear_ray.weights.fetch import WeightCache
from pear_ray.weights.registry import WeightVersion

log = logging.getLogger(__name__)

MakeCache = Callable[[], WeightCache]
# Results that finish within this time of each other share one poll.
COALESCE_SECONDS = 0.03


@dataclass(frozen=True)
class WeightUpdateResult:
    """A weight version that an engine has loaded. Generation stops only for `pause_seconds`."""

    version: int
    fetch_seconds: float
    prepare_seconds: float
    pause_seconds: float
    parity_logprobs: tuple[np.ndarray, ...]  # of each parity request, float32 [tokens]


@dataclass(frozen=True)
class PollResult:
    """Finished (key, result) pairs, and the engine's total idle time so far."""

    finished: list[tuple[str, Any]]
    idle_seconds: float


@ray.remote(num_cpus=0)
class EngineActor:
    """Runs one engine in a thread of its own and exits if it fails or hangs for `timeout_seconds`."""

    def __init__(self, make_engine: Callable[[], Generator], make_cache: MakeCache, timeout_seconds: float) -> None:
        # The blocking ray.get of a weight fetch runs in a thread, not in the event loop.
        os.environ["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"] = "0"
        self._cache = make_cache()
        self._timeout_seconds = timeout_seconds
        # Actions for the engine thread, which runs them between two steps.
        self._inbox: queue.SimpleQueue[Callable[[Generator], None]] = queue.SimpleQueue()
        # Requests for weights that are not loaded yet.
        self._held: list[tuple[str, Request]] = []
        self._finished: list[tuple[str, Any]] = []
        self._is_idle = True
        self._idle_seconds = 0.0
        self._has_finished = asyncio.Event()
        self._engine: Generator
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: Future[None] = Future()
        threading.Thread(target=self._run_engine, args=(make_engine,), daemon=True).start()

    async def ready(self) -> str:
        """Return the id of the node once the engine has started, or raise as it did. Must be called first."""
        self._loop = asyncio.get_running_loop()
        await asyncio.wrap_future(self._started)
        return ray.get_runtime_context().get_node_id()

    async def submit(self, requests: Sequence[tuple[str, Request]]) -> None:
        """Add all (key, request) pairs between the same two engine steps."""
        self._inbox.put(lambda engine: self._add_all(engine, requests))

    async def poll(self, wait_seconds: float) -> PollResult:
        """Return the results since the last call; wait up to `wait_seconds` for the first."""
        try:
            await asyncio.wait_for(self._has_finished.wait(), wait_seconds)
        except TimeoutError:
            return PollResult([], self._idle_seconds)
        if not self._is_idle:
            await asyncio.sleep(COALESCE_SECONDS)
        self._has_finished.clear()
        finished, self._finished = self._finished, []
        return PollResult(finished, self._idle_seconds)

    async def update_weights(
        self, versions: Sequence[WeightVersion], parity_requests: Sequence[ScoreRequest], timeout_seconds: float
    ) -> WeightUpdateResult:
        """Load the last of `versions`, each of which may be a delta from the one before. Generation goes on while they
        are fetched and prepared; unfinished completions continue with the new weights."""
        started = time.perf_counter()
        newest = versions[-1].version
        tensors = await asyncio.to_thread(self._fetch, versions, timeout_seconds)
        fetched = time.perf_counter()
        try:
            preparing = asyncio.to_thread(self._engine.prepare_weights, tensors)
            await asyncio.wait_for(preparing, self._timeout_seconds)
            prepared = time.perf_counter()
            pause_seconds, logprobs = await self._between_steps(
                lambda engine: (engine.swap_weights(newest), self._score(engine, parity_requests))
            )
        except Exception:  # of the engine, whose weights may be half old, half new
            self._exit("weights could not be loaded")
        return WeightUpdateResult(newest, fetched - started, prepared - fetched, pause_seconds, logprobs)

    def _fetch(self, versions: Sequence[WeightVersion], timeout_seconds: float) -> dict[str, Tensor]:
        *earlier, newest = versions
        if earlier and newest.base_version not in (None, self._cache.version):
            self._cache.fetch(earlier[0], timeout_seconds)
        return self._cache.fetch(newest, timeout_seconds)

    async def load_folder(self, path: str, version: int) -> None:
        """Serve the weights of a Hugging Face folder as `version`."""
        await self._between_steps(lambda engine: engine.load_folder(path, version))

    async def _between_steps(self, action: Callable[[Generator], Any]) -> Any:
        done: Future[Any] = Future()

        def act(engine: Generator) -> None:
            try:
                done.set_result(action(engine))
            except Exception as error:  # of the engine; the caller handles it
                done.set_exception(error)
            held, self._held = self._held, []
            self._add_all(engine, held)

        self._inbox.put(act)
        return await asyncio.wrap_future(done)

    def _run_engine(self, make_engine: Callable[[], Generator]) -> None:
        # Built in the thread that steps it: vLLM on CPUs keeps its number of OpenMP threads for each calling thread.
        try:
            with self._watchdog():
                engine = self._engine = make_engine()
        except BaseException as error:  # vLLM may raise SystemExit; `ready` raises all of them
            self._started.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            return
        self._started.set_result(None)
        try:
            while True:
                self._run_actions(engine)
                with self._watchdog():
                    self._report(engine.step(), engine.is_idle)
        except Exception:  # of the engine: its actor must not outlive it
            self._exit("the engine failed")

    @contextmanager
    def _watchdog(self) -> Iterator[None]:
        faulthandler.dump_traceback_later(self._timeout_seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _exit(self, reason: str) -> NoReturn:
        # The pool replaces the engine.
        log.exception(reason)
        logging.shutdown()
        os._exit(1)

    def _run_actions(self, engine: Generator) -> None:
        while engine.is_idle or not self._inbox.empty():
            began = time.perf_counter()
            action = self._inbox.get()
            self._idle_seconds += time.perf_counter() - began
            with self._watchdog():
                action(engine)

    def _add_all(self, engine: Generator, requests: Sequence[tuple[str, Request]]) -> None:
        for key, request in requests:
            if request.min_version > engine.version:
                self._held.append((key, request))
                continue
            try:
                engine.add(key, request)
            except Exception as error:  # of the engine, which refuses only this request
                self._report([(key, error)], engine.is_idle)

    def _score(self, engine: Generator, parity_requests: Sequence[ScoreRequest]) -> tuple[np.ndarray, ...]:
        # Before new requests are added: otherwise the engine's batches would depend on when messages arrive.
        keys = [f"parity-{number}" for number in range(len(parity_requests))]
        for key, request in zip(keys, parity_requests, strict=True):
            engine.add(key, request)
        logprobs: dict[str, Any] = {}
        while len(logprobs) < len(parity_requests):
            finished = engine.step()
            logprobs |= {key: result for key, result in finished if key in keys}
            self._report([pair for pair in finished if pair[0] not in keys], engine.is_idle)
        return tuple(logprobs[key] for key in keys)

    def _report(self, finished: Sequence[tuple[str, Any]], is_idle: bool) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._record, finished, is_idle)

    def _record(self, finished: Sequence[tuple[str, Any]], is_idle: bool) -> None:
        self._finished += finished
        self._is_idle = is_idle
        if finished:
            self._has_finished.set()
