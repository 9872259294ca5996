"""Held-out evaluation by the same engines, between two training steps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from pear_ray.config import Job
from pear_ray.data.tokenizer import encode_problems
from pear_ray.engines.generator import SampleRequest
from pear_ray.records import Completion, Grade, Problem
from pear_ray.statistics import bootstrap_interval, seed_of
from pear_ray.tasks import heldout_problems
from pear_ray.weights.registry import WeightVersion


class Evaluation:
    """Measures pass@1 of every `rl.eval_every`-th weight version, each time on the same problems with the same seeds.

    While an evaluation runs, engines get no newer weights and no other requests: each value belongs to one version, and
    on-policy runs repeat to the bit.
    """

    def __init__(self, job: Job, path: str) -> None:
        self._settings = job.evaluation
        self._seed = job.run.seed
        self._every = job.rl.eval_every
        num_problems = job.evaluation.num_problems
        self._problems = heldout_problems(job.tasks, num_problems, job.run.seed) if self._every else []
        self._prompts = encode_problems(path, self._problems, job.generator.max_model_len)
        self._started: set[int] = set()
        self._version = -1
        # By ("evaluation", weight version, number of the problem), until the completions are graded.
        self._open: dict[Hashable, Problem] = {}
        self._completions: dict[Hashable, tuple[Completion, ...]] = {}
        self._pass_rates: list[float] = []
        self._finished: dict[int, dict[str, float]] = {}

    @property
    def is_running(self) -> bool:
        """Return whether a completion or a grade is missing."""
        return bool(self._open)

    def has(self, key: Hashable) -> bool:
        """Return whether a request with this key is or was part of an evaluation."""
        return isinstance(key, tuple)

    def abandon(self) -> None:
        """Drop the running evaluation; it starts again when its version is served again."""
        if self._open:
            self._open = {}
            self._completions = {}
            self._started.discard(self._version)

    def up_to(self, versions: Sequence[WeightVersion]) -> tuple[WeightVersion, ...]:
        """Return `versions` up to the first that is due for evaluation."""
        due = (number for number, version in enumerate(versions) if self._is_due(version.version))
        return tuple(versions[: next(due, len(versions)) + 1])

    def next_requests(self, version: int) -> list[tuple[Hashable, SampleRequest]]:
        """Start the evaluation of `version` if it is due; return its requests."""
        if not self._is_due(version):
            return []
        self._started.add(version)
        self._version = version
        self._pass_rates = []
        self._open = {("evaluation", version, number): problem for number, problem in enumerate(self._problems)}
        num_samples, temperature = self._settings.samples_per_problem, self._settings.temperature
        requests: list[tuple[Hashable, SampleRequest]] = []
        for (key, problem), prompt in zip(self._open.items(), self._prompts, strict=True):
            seed = seed_of(self._seed, "evaluate", problem.problem_id)
            requests.append((key, SampleRequest(prompt, num_samples, seed, temperature, version)))
        return requests

    def add_completions(self, key: Hashable, completions: tuple[Completion, ...]) -> list[tuple[Problem, str]]:
        """Add completions; return (problem, text) pairs to grade, none if it was abandoned."""
        if key not in self._open:
            return []
        self._completions[key] = completions
        return [(self._open[key], completion.text) for completion in completions]

    def add_rewards(self, key: Hashable, grades: Sequence[Grade]) -> None:
        """Add the grades of completions."""
        if key not in self._open or not grades:
            return
        del self._open[key]
        self._pass_rates.append(float(np.mean([grade.correct for grade in grades])))
        if self._open:
            return
        pass_rates = np.array(self._pass_rates)
        low, high = bootstrap_interval(pass_rates, self._seed)
        completions = [c for group in self._completions.values() for c in group]
        self._completions = {}
        self._finished[self._version] = {
            "pass_at_1": float(pass_rates.mean()),
            "pass_at_1_low": low,
            "pass_at_1_high": high,
            "eval_tokens_mean": float(np.mean([len(c.token_ids) for c in completions])),
            "eval_clipped_ratio": float(np.mean([c.finish_reason == "length" for c in completions])),
        }

    def pop_finished(self) -> dict[int, dict[str, float]]:
        """Return the metrics of the evaluations finished since the last call, by version."""
        finished, self._finished = self._finished, {}
        return finished

    def _is_due(self, version: int) -> bool:
        return self._every > 0 and version % self._every == 0 and version not in self._started
