"""Log-probs of completions under the policy that RL starts from, for a KL penalty to it."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from pear_ray.engines.engine_pool import EnginePool
from pear_ray.engines.generator import ScoreRequest
from pear_ray.records import Completion

Completions = tuple[Completion, ...]


class ReferenceScorer(AbstractContextManager["ReferenceScorer"]):
    """Adds `reference_logprobs` to completions, from engines whose weights never change."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        # Completions by key, and the log-probs of those scored so far.
        self._open: dict[Hashable, tuple[Completions, dict[int, np.ndarray]]] = {}

    def __exit__(self, *error: object) -> None:
        self._pool.__exit__(*error)

    @property
    def pending_calls(self) -> list[Any]:
        """Return the references to wait for before `pop_finished`."""
        return self._pool.pending_calls

    def wait_ready(self) -> None:
        """Wait until the engines are ready."""
        self._pool.wait_ready()

    def submit(self, key: Hashable, prompt_ids: tuple[int, ...], completions: Completions) -> None:
        """Score the completions of a prompt."""
        self._open[key] = completions, {}
        for number, completion in enumerate(completions):
            self._pool.submit([((key, number), ScoreRequest(prompt_ids, completion.token_ids))])

    def pop_finished(self) -> list[tuple[Hashable, Completions]]:
        """Return the completions that have all been scored, by key."""
        finished: list[tuple[Hashable, Completions]] = []
        for place, logprobs in self._pool.pop_finished():
            assert isinstance(place, tuple)
            key, number = place
            completions, scored = self._open[key]
            scored[number] = logprobs
            if len(scored) == len(completions):
                del self._open[key]
                with_reference = (
                    replace(completion, reference_logprobs=tuple(scored[n].tolist()))
                    for n, completion in enumerate(completions)
                )
                finished.append((key, tuple(with_reference)))
        return finished
