"""Any dataset of reasoning-gym, by name and parameters: generated problems with their own judge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pear_ray.algorithms.seeds import seed_of
from pear_ray.records import Problem, Verdict


class ReasoningGym:
    """`ReasoningGym("countdown", min_numbers=4)`: answers are expected in <answer> tags.

    Problems are endless in practice; one in `1 / heldout_fraction` is held out, by a hash of the
    question, so no question is in both splits.
    """

    def __init__(self, dataset: str, heldout_fraction: float = 0.1, **parameters: Any) -> None:
        import reasoning_gym

        self.name = f"reasoning_gym/{dataset}"
        self._gym = reasoning_gym
        self._dataset = dataset
        self._heldout_fraction = heldout_fraction
        self._parameters = parameters
        self._judge = self._generated(seed=0, size=1)

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Distinct questions of a split."""
        system = self._gym.utils.SYSTEM_PROMPTS["default"]
        seen: set[str] = set()
        for entry in self._generated(seed, size=1_000_000):
            question = entry["question"]
            heldout = seed_of(question) < self._heldout_fraction * 2**31
            if question in seen or heldout != (split == "heldout"):
                continue
            seen.add(question)
            yield Problem(
                problem_id=f"{self._dataset}-{seed_of(question):08x}",
                task=self.name,
                messages=(
                    {"role": "system", "content": system},
                    {"role": "user", "content": question},
                ),
                reference=json.dumps(entry, default=str),
                split=split,
            )

    def verdict(self, problem: Problem, text: str) -> Verdict:
        """reasoning-gym's own score of what stands in the last <answer> tags."""
        answer = self._gym.utils.extract_answer(text)
        if answer is None:
            return Verdict(0.0, False, {"answered": 0.0}, "no <answer> tags")
        try:
            score = float(self._judge.score_answer(answer, json.loads(problem.reference)))
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
            return Verdict(0.0, False, {"answered": 1.0}, f"the judge failed: {error}")
        return Verdict(score, score == 1.0, {"answered": 1.0}, "")

    def _generated(self, seed: int, size: int) -> Any:
        return self._gym.create_dataset(self._dataset, seed=seed, size=size, **self._parameters)
