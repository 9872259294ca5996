"""A pool of vLLM engines, each in a Ray actor."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray

from pear_ray.config import Generator as Settings
from pear_ray.engines.generator import Generator, Request, same_architecture
from pear_ray.records import Completion
from pear_ray.weights.assemble import fetch
from pear_ray.weights.manifest import WeightVersion


@ray.remote
class GeneratorActor:
    """One engine in a process of its own."""

    def __init__(self, path: str, dtype: str, settings: Settings, seed: int) -> None:
        self._generator = Generator(path, dtype, settings, seed)

    def sample(
        self, requests: Sequence[Request], temperature: float
    ) -> list[tuple[Completion, ...]]:
        return self._generator.sample(requests, temperature)

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        return self._generator.score(rows)

    def update(self, version: WeightVersion, deadline_seconds: float) -> float:
        """Pull a version, then load it: generation pauses only for the second. Returns the
        seconds of the pause."""
        return self._generator.load(fetch(version, deadline_seconds), version.version)

    def load_folder(self, path: str, version: int) -> None:
        self._generator.load_folder(path, version)

    def ready(self) -> bool:
        return True


class GeneratorPool:
    """`settings.replicas` engines of one model, ended with the block. They start together, beside
    whatever the caller does next; the first call waits for them."""

    def __init__(self, path: str, dtype: str, settings: Settings, seed: int) -> None:
        self._dtype, self._settings, self._seed = dtype, for_sampling(settings), seed
        self._path, self._number = path, 0
        self._actors: list[Any] = []
        self._starting: list[Any] = []
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def serve(self, path: str) -> None:
        """Serve another model: engines that live load it where they can, or start anew."""
        self._number += 1
        if not same_architecture(self._path, path):
            self._stop()
            self._path = path
            self._start()
            return
        calls = [actor.load_folder.remote(path, self._number) for actor in self._started()]
        self._wait(calls, f"engines to load {path}")
        self._path = path

    def sample(
        self, requests: Sequence[Request], temperature: float
    ) -> list[tuple[Completion, ...]]:
        """The answers to each request, in order."""
        shared = zip(self._started(), self._shares(requests), strict=True)
        calls = [actor.sample.remote(share, temperature) for actor, share in shared]
        return interleave(self._wait(calls, f"answers to {len(requests)} prompts"))

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Log-probs of the response tokens of each (prompt_ids, response_ids), in order."""
        shared = zip(self._started(), self._shares(rows), strict=True)
        calls = [actor.score.remote(share) for actor, share in shared]
        return interleave(self._wait(calls, f"scores of {len(rows)} rows"))

    def update(self, version: WeightVersion, deadline_seconds: float) -> float:
        """Have every engine serve a version; returns the longest pause in seconds."""
        calls = [actor.update.remote(version, deadline_seconds) for actor in self._started()]
        return max(self._wait(calls, f"engines to load weights version {version.version}"))

    def _start(self) -> None:
        path, settings = self._path, self._settings
        actor = GeneratorActor.options(  # type: ignore[attr-defined]
            num_cpus=settings.num_cpus, num_gpus=settings.num_actor_gpus
        )
        self._actors = [
            actor.remote(path, self._dtype, settings, self._seed) for _ in range(settings.replicas)
        ]
        self._starting = [actor.ready.remote() for actor in self._actors]

    def _started(self) -> list[Any]:
        self._wait(self._starting, f"engines of {self._path} to start")
        self._starting = []
        return self._actors

    def _stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _shares(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        return [items[i :: len(self._actors)] for i in range(len(self._actors))]

    def _wait(self, calls: list[Any], what: str) -> list[Any]:
        deadline = self._settings.deadline_seconds
        try:
            return ray.get(calls, timeout=deadline)
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(
                f"waited {deadline:.0f} s (generator.deadline_seconds) for {what}"
            ) from error


def for_sampling(settings: Settings) -> Settings:
    """On CPUs an engine that samples reads every prompt in one piece (see `Generator`)."""
    if settings.num_gpus > 0:
        return settings
    whole = max(settings.batch_tokens, settings.max_model_len + 1)
    return settings.model_copy(update={"tokens_per_batch": whole})


def interleave(shares: Sequence[Sequence[Any]]) -> list[Any]:
    """Undo a deal of items to shares in turn."""
    whole: list[Any] = [None] * sum(len(share) for share in shares)
    for start, share in enumerate(shares):
        whole[start :: len(shares)] = share
    return whole
