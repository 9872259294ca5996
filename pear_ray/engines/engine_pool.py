"""vLLM engines in Ray actors: work goes to the one with the least of it, an engine that dies is
replaced and what it had not finished is given to others, one whose node is going to be taken back
goes before that, and there are more or fewer engines as work waits."""

from __future__ import annotations

import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import ray

from pear_ray.config import Generator as Settings
from pear_ray.engines.engine_actor import WeightUpdateResult
from pear_ray.engines.engine_handle import EngineFactory, EngineHandle, InFlight
from pear_ray.engines.generator import SampleRequest, ScoreRequest, same_architecture
from pear_ray.ray_cluster import draining_nodes
from pear_ray.weights.types import WeightVersion

log = logging.getLogger(__name__)

# How long an engine may leave the question what it has finished open, in seconds.
POLL_SECONDS = 10.0
# Beyond its deadlines an engine is taken for dead after so many seconds.
GRACE_SECONDS = 30.0
# What so many engines died over is not given to another.
MAX_ATTEMPTS = 20
# An engine beyond the fewest ends when nothing was to be done for so many seconds.
IDLE_SECONDS = 60.0
# A node that is taken back gives notice half a minute or two minutes before.
SECONDS_PER_LOOK = 2.0
# Engines that die without having finished anything, none of the others having done so meanwhile.
MAX_DEATHS = 5
MAX_FAILED_LOADS = 5


class EnginePool(AbstractContextManager["EnginePool"]):
    """Engines between `settings.fewest_engines` and `settings.num_engines`, ended with the block.

    They start together with the model in `path`, beside whatever the caller does next.
    `tell(kind, text)` hears of deaths and of engines that come and go.
    """

    def __init__(
        self,
        servers: EngineFactory,
        path: str,
        settings: Settings,
        tell: Callable[[str, str], None],
    ) -> None:
        self._servers, self._path, self._settings, self._tell = servers, path, settings, tell
        self._members: dict[str, EngineHandle] = {}
        # Calls that have not ended, and who hears of their end.
        self._calls: dict[Any, tuple[EngineHandle, Callable[[EngineHandle, Any], None]]] = {}
        self._finished: list[tuple[Hashable, Any]] = []
        self._backlog: deque[InFlight] = deque()
        self._versions: tuple[WeightVersion, ...] = ()
        self._probe: tuple[ScoreRequest, ...] = ()
        self._load_seconds = settings.timeout_seconds
        self._has_stood = False
        self._num_started = self._num_deaths = self._num_submitted = self._num_loaded = 0
        self._busy_until = self._looked = time.monotonic()
        # Of all engines together, since the beginning.
        self.idle_seconds = 0.0
        self.loaded: list[tuple[str, WeightUpdateResult]] = []
        self.failed_loads: list[tuple[str, Exception]] = []
        for _ in range(settings.fewest_engines):
            self._start()

    def __exit__(self, *error: object) -> None:
        for member in self._members.values():
            self._servers.end(member.actor)
        self._members, self._calls = {}, {}

    @property
    def calls(self) -> list[Any]:
        """References to calls, at whose end `finished` may have something new to say."""
        return list(self._calls)

    @property
    def num_sequences(self) -> int:
        """Sequences that are not finished."""
        waiting = sum(ticket.num_sequences for ticket in self._backlog)
        return waiting + sum(member.num_sequences for member in self._members.values())

    @property
    def num_engines(self) -> int:
        """Engines that stand or start."""
        return len(self._members)

    def submit(self, work: Sequence[tuple[Hashable, SampleRequest | ScoreRequest]]) -> None:
        """Have everything done, each piece once, and told under its key by `finished`."""
        self._backlog.extend(InFlight(key, item) for key, item in work)
        self._deal()

    def finished(self) -> list[tuple[Hashable, Any]]:
        """What has finished since the last call: answers or log-probs, as `Generator.step` gives
        them. Replaces engines that died meanwhile.

        Raises:
            RuntimeError: engines die in a row, or over the same piece of work.
            Exception: what kept an engine from starting, or why it refuses work.
        """
        self._advance()
        found, self._finished = self._finished, []
        for _, result in found:
            if isinstance(result, Exception):
                raise result
        return found

    def _advance(self) -> None:
        """Hear whoever has something to say, and give out what waits."""
        calls = list(self._calls)
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
        for call in ready:
            member, hear = self._calls.pop(call)
            if member.name not in self._members:
                continue
            try:
                hear(member, call)
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                # What it had to say may be lost with its node.
                self._replace(member, str(error))
        for member in self._overdue():
            self._replace(member, "it did not answer in time (generator.timeout_seconds)")
        for member in self._leaving():
            text = f"engine {member.name} goes before its node is taken back,"
            self._tell("preempted", f"{text} {len(member.open)} pieces of work go to others")
            self._end(member)
            self._start()
        self._deal()

    def serve(
        self,
        versions: tuple[WeightVersion, ...],
        probe: Sequence[ScoreRequest],
        timeout_seconds: float,
    ) -> None:
        """Have every engine serve the last of `versions` as soon as it can, and score the probe
        under it; `loaded` and `failed_loads` tell what came of it. `finished` raises RuntimeError
        when an engine fails to load again and again."""
        self._versions, self._probe = versions, tuple(probe)
        self._load_seconds = timeout_seconds
        for member in self._members.values():
            self._update(member)

    def load_folder(self, path: str) -> None:
        """Have every engine serve another model, or start new ones where it is of another
        architecture. Nothing may be under way.

        Raises:
            TimeoutError: an engine did not load it in time.
        """
        self.wait_ready()
        is_alike, self._path = same_architecture(self._path, path), path
        if not is_alike:
            for member in list(self._members.values()):
                self._end(member)
                self._start()
            return
        self._num_loaded += 1
        members = list(self._members.values())
        calls = [member.actor.load_folder.remote(path, self._num_loaded) for member in members]
        end = time.monotonic() + self._settings.timeout_seconds
        for member, call in zip(members, calls, strict=True):
            member.asked = -1
            try:
                ray.get(call, timeout=end - time.monotonic())
            except ray.exceptions.RayActorError as error:
                # Its successor starts with this model.
                self._replace(member, str(error))

    def autoscale(self, is_awaited: bool) -> None:
        """Start one more engine where somebody waits for answers and all engines have more to do
        than they can do at once; end one where there has been nothing to do for a while."""
        settings, num_engines, now = self._settings, len(self._members), time.monotonic()
        all_stand = all(member.stands for member in self._members.values())
        is_full = self.num_sequences > num_engines * settings.max_num_seqs
        if self.num_sequences:
            self._busy_until = now
        if is_awaited and is_full and all_stand and num_engines < settings.num_engines:
            self._tell("grown", f"engine {self._start().name} starts: work waits")
        elif now > self._busy_until + IDLE_SECONDS and num_engines > settings.fewest_engines:
            member = list(self._members.values())[-1]
            self._end(member)
            self._busy_until = now
            self._tell("shrunk", f"engine {member.name} ends: it had nothing to do")

    def wait_ready(self) -> None:
        """Wait until the first engines stand.

        Raises:
            TimeoutError: they do not in time.
        """
        end = time.monotonic() + self._settings.timeout_seconds
        while not all(member.stands for member in self._members.values()):
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(
                    f"waited {self._settings.timeout_seconds:.0f} s (generator.timeout_seconds)"
                    " for engines to start"
                )
            ray.wait(self.calls, timeout=left, fetch_local=False)
            self._advance()

    def generate(self, work: Sequence[SampleRequest | ScoreRequest]) -> list[Any]:
        """Have everything done and wait for it; results in the order of the work.

        Raises:
            TimeoutError: as `stream`.
        """
        results = dict(self.stream(work))
        return [results[number] for number in range(len(work))]

    def stream(self, work: Sequence[SampleRequest | ScoreRequest]) -> Iterator[tuple[int, Any]]:
        """Have everything done: the place in the work and the result of each piece, as it comes.

        Raises:
            TimeoutError: nothing finished for `settings.timeout_seconds`.
        """
        self.wait_ready()
        # Not to be taken for what an earlier question left under way.
        question = object()
        missing: dict[Hashable, int] = {(question, number): number for number in range(len(work))}
        self.submit(list(zip(missing, work, strict=True)))
        end = time.monotonic() + self._settings.timeout_seconds
        while missing:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"waited {self._settings.timeout_seconds:.0f} s (generator.timeout_seconds)"
                    f" for one of {len(missing)} answers"
                )
            ray.wait(self.calls, timeout=1.0, fetch_local=False)
            for key, result in self.finished():
                end = time.monotonic() + self._settings.timeout_seconds
                if key in missing:
                    yield missing.pop(key), result

    def _start(self) -> EngineHandle:
        actor = self._servers.start(self._path)
        member = EngineHandle(str(self._num_started), actor)
        self._num_started += 1
        self._members[member.name] = member
        self._calls[actor.ready.remote()] = member, self._hear_start
        return member

    def _hear_start(self, member: EngineHandle, call: Any) -> None:
        try:
            member.node = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            if not self._has_stood:
                raise
            # One like it has stood: what keeps it from starting may pass.
            self._replace(member, str(error))
            return
        member.stands = self._has_stood = True
        self._poll(member)
        if self._versions:
            self._update(member)

    def _poll(self, member: EngineHandle) -> None:
        member.polled = time.monotonic()
        self._calls[member.actor.finished.remote(POLL_SECONDS)] = member, self._hear_finished

    def _hear_finished(self, member: EngineHandle, call: Any) -> None:
        report = ray.get(call)
        self.idle_seconds += report.idle_seconds - member.idle_seconds
        member.idle_seconds = report.idle_seconds
        for key, result in report.finished:
            ticket = member.open.pop(key)
            member.num_sequences -= ticket.num_sequences
            self._finished.append((ticket.key, result))
            self._num_deaths, member.has_finished = 0, True
        self._poll(member)

    def _leaving(self) -> list[EngineHandle]:
        """Engines whose nodes are going to be taken back, asked for now and then."""
        if time.monotonic() < self._looked + SECONDS_PER_LOOK:
            return []
        self._looked, draining = time.monotonic(), draining_nodes()
        return [member for member in self._members.values() if member.node in draining]

    def _overdue(self) -> list[EngineHandle]:
        latest = time.monotonic() - POLL_SECONDS - self._settings.timeout_seconds - GRACE_SECONDS
        return [m for m in self._members.values() if m.stands and m.polled < latest]

    def _update(self, member: EngineHandle) -> None:
        """Ask an engine for the newest version, unless it is loading or was asked already."""
        newest = self._versions[-1].version
        if not member.stands or member.loading or member.asked >= newest:
            return
        call = member.actor.update.remote(self._versions, self._probe, self._load_seconds)
        self._calls[call] = member, self._hear_load
        member.loading, member.asked = True, newest

    def _hear_load(self, member: EngineHandle, call: Any) -> None:
        member.loading = False
        try:
            self.loaded.append((member.name, ray.get(call)))
        except ray.exceptions.RayTaskError as error:
            # It serves what it served before, until something is announced again.
            member.asked = -1
            self.failed_loads.append((member.name, error.cause))
            member.num_failed_loads += 1
            if member.num_failed_loads == MAX_FAILED_LOADS:
                raise RuntimeError(
                    f"engine {member.name} could not load weights {MAX_FAILED_LOADS} times in a"
                    f" row: {error.cause}"
                ) from error
            return
        member.num_failed_loads = 0
        self._update(member)

    def _end(self, member: EngineHandle) -> None:
        del self._members[member.name]
        self._servers.end(member.actor)
        self._backlog.extendleft(reversed(member.open.values()))

    def _replace(self, member: EngineHandle, why: str) -> None:
        """Start another engine in the place of a dead one; its work goes to whoever is free.

        Raises:
            RuntimeError: it is not the first to die like this.
        """
        self._num_deaths += not member.has_finished
        text = f"engine {member.name} died, {len(member.open)} pieces of work go to others: {why}"
        self._tell("died", text)
        worn = [t.key for t in member.open.values() if t.num_attempts >= MAX_ATTEMPTS]
        if worn:
            raise RuntimeError(f"{MAX_ATTEMPTS} engines died over the work {worn[0]}; {text}")
        if self._num_deaths > MAX_DEATHS:
            raise RuntimeError(f"{self._num_deaths} engines died before they did anything; {text}")
        self._end(member)
        self._start()

    def _deal(self) -> None:
        """Give waiting work to the engines with the least of it, each its share in one call."""
        if not self._backlog:
            return
        able = [(m.num_sequences, int(m.name), m) for m in self._members.values() if m.stands]
        if not able:
            return
        heapq.heapify(able)
        given: dict[str, list[tuple[str, SampleRequest | ScoreRequest]]] = {}
        while self._backlog:
            ticket = self._backlog.popleft()
            _, number, member = able[0]
            self._num_submitted += 1
            ticket.num_attempts += 1
            key = str(self._num_submitted)
            member.open[key] = ticket
            member.num_sequences += ticket.num_sequences
            given.setdefault(member.name, []).append((key, ticket.work))
            heapq.heapreplace(able, (member.num_sequences, number, member))
        for name, share in given.items():
            self._members[name].actor.submit.remote(share)
