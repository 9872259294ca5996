"""Datasets of reasoning-gym: generated problems, each dataset with its own scorer."""

from __future__ import annotations

import hashlib
import math
from ast import literal_eval
from collections.abc import Iterator
from functools import partial
from typing import Any

from pear_ray.records import Grade, Problem
from pear_ray.tasks import check_heldout_fraction, check_split, split_by_hash


class ReasoningGym:
    """`ReasoningGym("countdown", min_numbers=4)`: answers are expected in <answer> tags. Problems are endless in
    practice. A hash of the question holds out `heldout_fraction` of them, so no question is in both splits. `label` is
    the task's name, "reasoning_gym/DATASET" if None.

    Some of reasoning-gym's scorers pass the answer to Python's `eval` (binary_matrix, n_queens, spiral_matrix,
    string_insertion) or to sympy's parser, which calls it (countdown, puzzle24, polynomial_multiplication,
    simple_integration, intermediate_integration): text that a model writes can run there with the rights of the reward
    worker's process.
    """

    def __init__(
        self, dataset: str, label: str | None = None, heldout_fraction: float = 0.1, **parameters: Any
    ) -> None:
        import reasoning_gym

        check_heldout_fraction(heldout_fraction)
        self.name = f"reasoning_gym/{dataset}" if label is None else label
        self._gym = reasoning_gym
        self._heldout_fraction = heldout_fraction
        self._create = partial(reasoning_gym.create_dataset, dataset, **parameters)
        try:
            self._scorer = self._create(seed=0, size=1)
        except AssertionError as error:  # reasoning-gym's datasets assert the range of their parameters.
            raise ValueError(f"parameters of dataset {dataset!r}: {error}") from error

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Yield distinct questions of the split."""
        check_split(split)
        system = self._gym.utils.SYSTEM_PROMPTS["default"]
        seen: set[str] = set()
        for entry in self._create(seed=seed, size=1_000_000):
            question = entry["question"]
            if question in seen or split_by_hash(question, self._heldout_fraction) != split:
                continue
            seen.add(question)
            problem_id = f"{self.name}-{hashlib.sha256(question.encode()).hexdigest()[:16]}"
            messages = ({"role": "system", "content": system}, {"role": "user", "content": question})
            yield Problem(problem_id, self.name, messages, repr(_to_literals(entry)), split)

    def grade(self, problem: Problem, text: str) -> Grade:
        """Reward the content of the last <answer> tags with the dataset's own score."""
        answer = self._gym.utils.extract_answer(text)
        if answer is None:
            return Grade(0.0, False, {"answered": 0.0}, "no <answer> tags")
        try:
            score = float(self._scorer.score_answer(answer, literal_eval(problem.reference)))
        except Exception as error:  # Each of a hundred scorers raises its own.
            return Grade(0.0, False, {"answered": 1.0}, f"the scorer failed: {type(error).__name__}: {error}")
        return Grade(score, score == 1.0, {"answered": 1.0}, "" if score > 0 else "the scorer gave 0")


def _to_literals(value: Any) -> Any:
    """Return an entry of Python literals alone. Unlike in JSON, tuples stay tuples: scorers of grids compare them."""
    if isinstance(value, dict):
        return {_to_literals(key): _to_literals(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        plain = type(value) in (list, tuple)
        return type(value)(map(_to_literals, value)) if plain else str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
