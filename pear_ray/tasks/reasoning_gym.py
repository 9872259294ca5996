"""Any dataset of reasoning-gym, by name and parameters: generated problems with their own judge."""

from __future__ import annotations

import hashlib
import math
from ast import literal_eval
from collections.abc import Iterator
from typing import Any

from pear_ray.records import Grade, Problem
from pear_ray.seeds import seed_of


class ReasoningGym:
    """`ReasoningGym("countdown", min_numbers=4)`: answers are expected in <answer> tags.

    Problems are endless in practice; one in `1 / heldout_fraction` is held out, by a hash of the
    question, so no question is in both splits. Two tasks of one dataset are told apart by `label`.

    Some of reasoning-gym's own judges hand the answer to Python's `eval` (binary_matrix, n_queens,
    spiral_matrix, string_insertion) or to sympy's parser, which does the same (countdown, puzzle24,
    polynomial_multiplication, simple_integration, intermediate_integration). With these, what a
    model writes can run with the rights of the verifier's process.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: a dataset or a fraction that there is not.
        TypeError: a parameter that the dataset does not know.
    """

    def __init__(
        self,
        dataset: str,
        label: str | None = None,
        heldout_fraction: float = 0.1,
        **parameters: Any,
    ) -> None:
        import reasoning_gym

        if not 0 < heldout_fraction < 1:
            raise ValueError(
                f"heldout_fraction: read {heldout_fraction}, expected 0 to 1 exclusive"
            )
        self.name = f"reasoning_gym/{dataset}" if label is None else label
        self._gym = reasoning_gym
        self._dataset = dataset
        self._heldout_fraction = heldout_fraction
        self._parameters = parameters
        try:
            self._judge = self._generated(seed=0, size=1)
        except AssertionError as error:
            # So the datasets refuse a parameter that is out of its range.
            raise ValueError(f"dataset {dataset!r} refuses its parameters: {error}") from error

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Distinct questions of a split."""
        if split not in ("train", "heldout"):
            raise ValueError(f"split: read {split!r}, expected 'train' or 'heldout'")
        system = self._gym.utils.SYSTEM_PROMPTS["default"]
        seen: set[str] = set()
        for entry in self._generated(seed, size=1_000_000):
            question = entry["question"]
            heldout = seed_of(question) < self._heldout_fraction * 2**31
            if question in seen or heldout != (split == "heldout"):
                continue
            seen.add(question)
            yield Problem(
                problem_id=f"{self.name}-{hashlib.sha256(question.encode()).hexdigest()[:16]}",
                task=self.name,
                messages=(
                    {"role": "system", "content": system},
                    {"role": "user", "content": question},
                ),
                reference=repr(_literals(entry)),
                split=split,
            )

    def grade(self, problem: Problem, text: str) -> Grade:
        """reasoning-gym's own score of what stands in the last <answer> tags."""
        answer = self._gym.utils.extract_answer(text)
        if answer is None:
            return Grade(0.0, False, {"answered": 0.0}, "no <answer> tags")
        try:
            score = float(self._judge.score_answer(answer, literal_eval(problem.reference)))
        except Exception as error:  # of a hundred judges: any
            note = f"the judge failed: {type(error).__name__}: {error}"
            return Grade(0.0, False, {"answered": 1.0}, note)
        note = "" if score > 0 else "the judge gave 0"
        return Grade(score, score == 1.0, {"answered": 1.0}, note)

    def _generated(self, seed: int, size: int) -> Any:
        return self._gym.create_dataset(self._dataset, seed=seed, size=size, **self._parameters)


def _literals(value: Any) -> Any:
    """An entry of literals alone. Tuples stay tuples, which JSON would make lists: judges of grids
    compare them with their own."""
    if isinstance(value, dict):
        return {_literals(key): _literals(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_literals, value)) if type(value) in (list, tuple) else str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
