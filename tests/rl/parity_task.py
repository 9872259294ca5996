"""A task for untrained models with a vocabulary of a hundred words: a completion is correct if its first word is even,
so that some of every group are. The processes of a run import this module."""

from __future__ import annotations

import random

from pear_ray.records import Grade, Problem


class Parity:
    name = "parity"

    def problems(self, split, seed):
        order = list(range(97 * 97))
        random.Random(f"{split} {seed}").shuffle(order)
        for number in order:
            if (number % 10 == 0) == (split == "heldout"):
                words = f"w{number // 97} w{number % 97}"
                messages = ({"role": "user", "content": words},)
                yield Problem(f"parity-{number}", self.name, messages, words, split)

    def grade(self, problem, text):
        first, *_ = [*text.split(), "w1"]
        is_even = first[1:].isdigit() and int(first[1:]) % 2 == 0
        return Grade(float(is_even), is_even, note="" if is_even else "odd")
