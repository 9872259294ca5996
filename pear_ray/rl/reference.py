"""What the policy that RL starts from thinks of sampled answers, for a KL penalty to it."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from pear_ray.engines.engine_pool import EnginePool
from pear_ray.engines.generator import ScoreRequest
from pear_ray.records import Completion

Answers = tuple[Completion, ...]


class NoReference(AbstractContextManager["NoReference"]):
    """Hands answers on as they are."""

    calls: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self._passing: list[tuple[Hashable, Answers]] = []

    def __exit__(self, *error: object) -> None:
        return None

    def wait_ready(self) -> None:
        """There is nothing to wait for."""

    def submit(self, key: Hashable, prompt_ids: tuple[int, ...], answers: Answers) -> None:
        """Have `finished` tell of these answers."""
        self._passing.append((key, answers))

    def finished(self) -> list[tuple[Hashable, Answers]]:
        """What was submitted since the last call."""
        passed, self._passing = self._passing, []
        return passed


class Reference(AbstractContextManager["Reference"]):
    """Adds its log-probs to answers, by engines that always serve the same model."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._open: dict[Hashable, tuple[Answers, dict[int, np.ndarray]]] = {}
        self._places: dict[Hashable, tuple[Hashable, int]] = {}

    def __exit__(self, *error: object) -> None:
        self._pool.__exit__(*error)

    @property
    def calls(self) -> list[Any]:
        """References to calls, at whose end `finished` may have something new to say."""
        return self._pool.calls

    def wait_ready(self) -> None:
        """Wait until its engines stand."""
        self._pool.wait_ready()

    def submit(self, key: Hashable, prompt_ids: tuple[int, ...], answers: Answers) -> None:
        """Have the answers to a prompt scored."""
        self._open[key] = answers, {}
        for number, answer in enumerate(answers):
            place = (key, number)
            self._places[place] = place
            self._pool.submit([(place, ScoreRequest(prompt_ids, answer.token_ids))])

    def finished(self) -> list[tuple[Hashable, Answers]]:
        """Answers that have all been scored, with `reference_logprobs`."""
        done: list[tuple[Hashable, Answers]] = []
        for place, logprobs in self._pool.finished():
            key, number = self._places.pop(place)
            answers, found = self._open[key]
            found[number] = logprobs
            if len(found) == len(answers):
                del self._open[key]
                scored = (
                    replace(answer, reference_logprobs=tuple(found[n].tolist()))
                    for n, answer in enumerate(answers)
                )
                done.append((key, tuple(scored)))
        return done
