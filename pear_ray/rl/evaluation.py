"""Held-out problems, answered by the same engines between two learner steps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from pear_ray.config import Job
from pear_ray.data.tokenizer import prompts_that_fit
from pear_ray.engines.generator import SampleRequest
from pear_ray.records import Completion, Grade, Problem
from pear_ray.seeds import seed_of
from pear_ray.statistics import bootstrap_interval
from pear_ray.tasks import heldout_problems
from pear_ray.weights.types import WeightVersion

Key = tuple[str, int, int]


class Evaluation:
    """pass@1 of every `rl.eval_every`-th weight version, on the same problems with the
    same seeds each time. While it runs engines get no newer weights and no other work, so each
    value is that of one version, and on-policy runs repeat to the bit."""

    def __init__(self, job: Job, path: str) -> None:
        self._settings, self._seed = job.evaluation, job.run.seed
        self._every = job.rl.eval_every
        self._problems = (
            heldout_problems(job.tasks, job.evaluation.num_problems, job.run.seed)
            if self._every
            else []
        )
        self._prompts = prompts_that_fit(path, self._problems, job.generator.max_model_len)
        self._begun: set[int] = set()
        self._answers: dict[Hashable, tuple[Completion, ...]] = {}
        self._open: dict[Hashable, int] = {}
        self._correct: dict[int, float] = {}
        self._version = -1
        self._finished: dict[int, dict[str, float]] = {}

    @property
    def is_running(self) -> bool:
        """Whether an answer or a verdict is missing."""
        return bool(self._open)

    def has(self, key: Hashable) -> bool:
        """Whether work under this key is, or was, part of it."""
        return isinstance(key, tuple)

    def abandon(self) -> None:
        """Give up what is running; it is due again when its version is served again."""
        if self._open:
            self._open, self._answers = {}, {}
            self._begun.discard(self._version)

    def up_to(self, versions: Sequence[WeightVersion]) -> tuple[WeightVersion, ...]:
        """The first of these versions, up to one that is to be evaluated."""
        for number, version in enumerate(versions):
            if self._is_due(version.version):
                return tuple(versions[: number + 1])
        return tuple(versions)

    def next_requests(self, version: int) -> list[tuple[Key, SampleRequest]]:
        """What to ask if the engines are about to serve `version`."""
        if not self._is_due(version):
            return []
        self._begun.add(version)
        self._version, self._correct = version, {}
        work: list[tuple[Key, SampleRequest]] = []
        for number, problem in enumerate(self._problems):
            key = ("evaluation", version, number)
            self._open[key] = number
            request = SampleRequest(
                self._prompts[number],
                self._settings.samples_per_problem,
                seed_of(self._seed, "evaluate", problem.problem_id),
                self._settings.temperature,
                version,
            )
            work.append((key, request))
        return work

    def add_completions(
        self, key: Hashable, answers: tuple[Completion, ...]
    ) -> list[tuple[Problem, str]]:
        """Note answers; returns what is to be judged, nothing of what was given up."""
        if key not in self._open:
            return []
        self._answers[key] = answers
        problem = self._problems[self._open[key]]
        return [(problem, answer.text) for answer in answers]

    def add_rewards(self, key: Hashable, grades: Sequence[Grade]) -> None:
        """Note the verdicts on them."""
        if key not in self._open or not grades:
            return
        number = self._open.pop(key)
        self._correct[number] = float(np.mean([grade.correct for grade in grades]))
        if not self._open:
            self._finished[self._version] = self._numbers()
            self._answers = {}

    def finished(self) -> dict[int, dict[str, float]]:
        """What was measured since the last call, by version."""
        found, self._finished = self._finished, {}
        return found

    def _is_due(self, version: int) -> bool:
        return self._every > 0 and version % self._every == 0 and version not in self._begun

    def _numbers(self) -> dict[str, float]:
        values = np.array(list(self._correct.values()))
        low, high = bootstrap_interval(values, self._seed)
        answers = [answer for group in self._answers.values() for answer in group]
        cut = [answer.finish_reason == "length" for answer in answers]
        return {
            "pass_at_1": float(values.mean()),
            "pass_at_1_low": low,
            "pass_at_1_high": high,
            "eval_tokens_mean": float(np.mean([len(a.token_ids) for a in answers])),
            "eval_clipped_ratio": float(np.mean(cut)),
        }
