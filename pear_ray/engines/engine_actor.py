"""An engine in a process of its own, which answers while requests come and weights change."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
import ray
from torch import Tensor

from pear_ray.engines.generator import SampleRequest, ScoreRequest
from pear_ray.weights.adapters import AdapterCache
from pear_ray.weights.fetch import WeightCache
from pear_ray.weights.types import WeightVersion

log = logging.getLogger(__name__)

# While an engine is at work, what finishes within so many seconds is told together.
GATHER_SECONDS = 0.03

Work = tuple[str, SampleRequest | ScoreRequest]


class Engine(Protocol):
    """What a server serves; `pear_ray.engines.generator.Generator` is one."""

    version: int

    @property
    def is_idle(self) -> bool:
        """Whether everything that was added is finished."""

    def add(self, key: str, work: SampleRequest | ScoreRequest) -> None:
        """Take up work."""

    def step(self) -> list[tuple[str, Any]]:
        """Go on with all of it; returns what finished."""

    def prepare(self, tensors: dict[str, Tensor]) -> None:
        """Make weights ready to be taken; called from another thread."""

    def take(self, version: int) -> float:
        """Replace the weights by the prepared ones; returns the seconds of the pause."""

    def load_folder(self, path: str, version: int) -> None:
        """Replace the weights by those of a folder."""


@dataclass(frozen=True)
class WeightUpdateResult:
    """A version that an engine serves: seconds in which it was fetched and then prepared, while
    generation went on, seconds of the pause, and the probe's log-probs under it, trace after
    trace."""

    version: int
    fetch_seconds: float
    prepare_seconds: float
    pause_seconds: float
    probe: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class PollResult:
    """What finished, by key, and the seconds that the engine has had nothing to do so far."""

    finished: list[tuple[str, Any]]
    idle_seconds: float


@ray.remote(num_cpus=0)
class EngineActor:
    """`make` builds the engine, in the thread that will use it: vLLM on CPUs keeps its number of
    threads by thread. An engine that hangs for `timeout_seconds`, or fails, ends the process."""

    def __init__(
        self,
        make: Callable[[], Engine],
        make_replica: Callable[[], WeightCache | AdapterCache],
        timeout_seconds: float,
    ) -> None:
        # Weights are fetched in a thread of their own: nothing that is asynchronous waits for it.
        os.environ["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"] = "0"
        self._replica = make_replica()
        self._deadline_seconds = timeout_seconds
        self._inbox: queue.SimpleQueue[Callable[[Engine], None]] = queue.SimpleQueue()
        # Work for weights that have yet to come.
        self._held: deque[Work] = deque()
        self._finished: list[tuple[str, Any]] = []
        self._is_idle = True
        self._idle_seconds = 0.0
        self._news = asyncio.Event()
        self._engine: Engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: Future[None] = Future()
        threading.Thread(target=self._run, args=(make,), daemon=True).start()

    async def ready(self) -> str:
        """Returns when the engine stands, the id of its node; raises what kept it from it. Comes
        before all else."""
        self._loop = asyncio.get_running_loop()
        await asyncio.wrap_future(self._started)
        return ray.get_runtime_context().get_node_id()

    async def submit(self, work: Sequence[Work]) -> None:
        """Take up all of it between the same two steps of the engine."""
        self._inbox.put(lambda engine: self._take_up(engine, work))

    async def finished(self, wait_seconds: float) -> PollResult:
        """What finished since the last call; waits for the first, but not longer."""
        try:
            await asyncio.wait_for(self._news.wait(), wait_seconds)
        except TimeoutError:
            return PollResult([], self._idle_seconds)
        if not self._is_idle:
            await asyncio.sleep(GATHER_SECONDS)
        self._news.clear()
        found, self._finished = self._finished, []
        return PollResult(found, self._idle_seconds)

    async def update(
        self,
        versions: Sequence[WeightVersion],
        probe: Sequence[ScoreRequest],
        timeout_seconds: float,
    ) -> WeightUpdateResult:
        """Serve the last of `versions`, each of which may be a change to the one before.
        Generation goes on while it is fetched and prepared, and pauses for the change alone;
        answers that are under way go on under the new weights."""
        started = time.perf_counter()
        newest = versions[-1].version
        tensors = await asyncio.to_thread(self._fetch, versions, timeout_seconds)
        fetched = time.perf_counter()
        try:
            preparing = asyncio.to_thread(self._engine.prepare, tensors)
            await asyncio.wait_for(preparing, self._deadline_seconds)
            prepared = time.perf_counter()
            pause, scores = await self._between_steps(
                lambda engine: (engine.take(newest), self._ask(engine, probe))
            )
        except Exception:  # the engine's: half of its weights may be new
            self._die("weights could not be loaded")
        return WeightUpdateResult(newest, fetched - started, prepared - fetched, pause, scores)

    def _fetch(
        self, versions: Sequence[WeightVersion], timeout_seconds: float
    ) -> dict[str, Tensor]:
        """Parameters of the last version, by way of the first where it is a change to that."""
        *earlier, newest = versions
        if earlier and newest.base_version not in (None, self._replica.version):
            self._replica.fetch(earlier[0], timeout_seconds)
        return self._replica.fetch(newest, timeout_seconds)

    async def load_folder(self, path: str, version: int) -> None:
        """Serve the weights of a Hugging Face folder."""
        await self._between_steps(lambda engine: engine.load_folder(path, version))

    async def _between_steps(self, action: Callable[[Engine], Any]) -> Any:
        """Have the engine's thread do something, and go on with what waited for it."""
        done: Future[Any] = Future()

        def act(engine: Engine) -> None:
            try:
                done.set_result(action(engine))
            except Exception as error:  # the engine's: whoever asked decides what it means
                done.set_exception(error)
            held, self._held = list(self._held), deque()
            self._take_up(engine, held)

        self._inbox.put(act)
        return await asyncio.wrap_future(done)

    def _run(self, make: Callable[[], Engine]) -> None:
        """The engine's thread."""
        try:
            with self._in_time():
                engine = self._engine = make()
        except BaseException as error:  # the engine's, which may ask to exit: told by `ready`
            told = error if isinstance(error, Exception) else RuntimeError(repr(error))
            self._started.set_exception(told)
            return
        self._started.set_result(None)
        try:
            while True:
                self._do_what_is_asked(engine)
                with self._in_time():
                    self._tell(engine.step(), engine.is_idle)
        except Exception:  # the engine's: an actor whose engine is dead must not look alive
            self._die("the engine failed")

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """An engine that hangs ends its process."""
        faulthandler.dump_traceback_later(self._deadline_seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _die(self, why: str) -> NoReturn:
        """End the process, so that the engine is replaced."""
        log.exception(why)
        logging.shutdown()
        os._exit(1)

    def _do_what_is_asked(self, engine: Engine) -> None:
        """Empty the inbox; wait for it while there is no other work."""
        while engine.is_idle or not self._inbox.empty():
            began = time.perf_counter()
            action = self._inbox.get()
            self._idle_seconds += time.perf_counter() - began
            with self._in_time():
                action(engine)

    def _take_up(self, engine: Engine, work: Sequence[Work]) -> None:
        for key, item in work:
            if item.min_version > engine.version:
                self._held.append((key, item))
            else:
                self._add(engine, key, item)

    def _add(self, engine: Engine, key: str, item: SampleRequest | ScoreRequest) -> None:
        try:
            engine.add(key, item)
        except Exception as error:  # the engine's: it refuses this piece of work alone
            self._tell([(key, error)], engine.is_idle)

    def _ask(self, engine: Engine, probe: Sequence[ScoreRequest]) -> tuple[np.ndarray, ...]:
        """The probe's log-probs, before any other work is taken up: what an engine works on
        together must not depend on when a message came."""
        keys = [f"probe-{number}" for number in range(len(probe))]
        for key, trace in zip(keys, probe, strict=True):
            engine.add(key, trace)
        scores: dict[str, np.ndarray] = {}
        while len(scores) < len(probe):
            finished = engine.step()
            scores |= {key: result for key, result in finished if key in keys}
            self._tell([pair for pair in finished if pair[0] not in keys], engine.is_idle)
        return tuple(scores[key] for key in keys)

    def _tell(self, finished: Sequence[tuple[str, Any]], is_idle: bool) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._note, finished, is_idle)

    def _note(self, finished: Sequence[tuple[str, Any]], is_idle: bool) -> None:
        self._finished += finished
        self._is_idle = is_idle
        if finished:
            self._news.set()
