"""Countdown: reach a target with three numbers, used once each, and + - * /.

Prompts and answers are space-separated words, one per number, sign and style, so that a word-level tokenizer fits the
game: a prompt is `3 7 9 > 30 :`, an answer a style word and a chain of steps.

| style     | an answer to `3 7 9 > 30 :`                                                                       |
|-----------|---------------------------------------------------------------------------------------------------|
| build     | `build 7 * 3 = 21 , 21 + 9 = 30`, forward to the target                                           |
| undo      | `undo 30 - 9 = 21 , 21 / 3 = 7`, backward from the target to the last number                      |
| retry     | `build 3 + 7 = 10 , 10 + 9 = 19 no build 7 * 3 = 21 , 21 + 9 = 30`: a failure first               |
| multi     | `attempts` chains with `no` between them                                                          |
| off_topic | the same, but all chains except the last use other numbers than the problem's                     |
| cipher    | `cipher 61 87 56 ... 6 : undo 30 - 9 = 21 , 21 / 3 = 7`: the first numbers follow a private rule, |
|           | so a reader without the rule finds them improbable                                                |
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from pear_ray.records import Grade, Problem
from pear_ray.tasks import check_heldout_fraction, check_split

SIGNS = "+-*/"
INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}
STYLES = ("build", "undo", "retry", "multi", "off_topic", "cipher")
READABLE_STYLES = ("build", "undo", "retry", "cipher")
NUM_NUMBERS = 3
CODE_SUCCESSORS = 3

Numbers = tuple[int, ...]
Chain = tuple["Step", ...]


class Step(NamedTuple):
    """One step of a chain: `Step(7, "*", 3, 21)` is `7 * 3 = 21`."""

    left: int
    sign: str
    right: int
    result: int


def write_chain(style: str, chain: Chain) -> str:
    """Return the chain as an answer: `build 7 * 3 = 21 , 21 + 9 = 30`."""
    return f"{style} " + " , ".join(f"{left} {sign} {right} = {result}" for left, sign, right, result in chain)


def read_style(text: str) -> str:
    """Return the style of any text, "" if it has none: `build 3 + 7 = 10 no build` is "retry"."""
    words = text.split()
    if not words or words[0] not in ("build", "undo", "cipher"):
        return ""
    return "retry" if "no" in words and words[0] != "cipher" else words[0]


@dataclass(eq=False)
class Countdown:
    """Generated problems with a certain grade, and demonstrations of the game. A problem is three sorted numbers and a
    target that they reach: 4,473 of them with `max_number=12`. A hash of the problem alone decides its split. An answer
    is correct if one of its last `attempts` chains is; one of style cipher begins with `cipher_numbers` numbers."""

    label: str = "countdown"
    max_number: int = 12
    max_result: int = 99
    heldout_fraction: float = 0.1
    attempts: int = 1
    cipher_numbers: int = 30

    def __post_init__(self) -> None:
        if self.max_number < 1 or self.max_result < 2 * self.max_number:
            raise ValueError(
                f"max_result: expected at least 2 * max_number = {2 * self.max_number}, so that each position has a"
                f" legal step, got {self.max_result}"
            )
        check_heldout_fraction(self.heldout_fraction)
        for field, value in (("attempts", self.attempts), ("cipher_numbers", self.cipher_numbers)):
            if value < 1:
                raise ValueError(f"{field}: expected at least 1, got {value}")
        self.name = self.label
        self._number_words = dict.fromkeys(map(str, range(self.max_result + 1)))

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Yield each problem of the split once, in an order fixed by the seed."""
        check_split(split)
        order = list(self._chains[split])
        random.Random(f"{self.name} {split} {seed}").shuffle(order)
        for numbers, target in order:
            yield self._problem(numbers, target, split)

    def demonstrations(
        self, styles: Mapping[str, float], solved_fraction: float, seed: int
    ) -> Iterator[tuple[Problem, str]]:
        """Yield problems of split train with answers, forever, in styles drawn by weight. A problem is drawn in
        proportion to the number of chains that solve it. `solved_fraction` of the answers (in style multi: of the
        chains) solve it; the others are random legal chains of its numbers, which teach format and arithmetic and reach
        the target by chance only."""
        if set(styles) - set(STYLES) or any(v < 0 for v in styles.values()) or not any(styles.values()):
            raise ValueError(f"styles: expected weights over {', '.join(STYLES)}, got {dict(styles)}")
        if styles.get("off_topic") and self.max_number < 2 * NUM_NUMBERS:
            raise ValueError(
                f"styles: expected max_number of at least {2 * NUM_NUMBERS} for style off_topic, which"
                f" uses numbers outside the problem, got {self.max_number}"
            )
        if not 0 <= solved_fraction <= 1:
            raise ValueError(f"solved_fraction: expected 0 to 1, got {solved_fraction}")
        chains = self._chains["train"]
        keys = list(chains)
        weights = list(itertools.accumulate(map(len, chains.values())))
        rng = random.Random(f"{self.name} demonstrations {seed}")
        names, style_weights = list(styles), list(styles.values())
        while True:
            (key,) = rng.choices(keys, cum_weights=weights)
            (style,) = rng.choices(names, style_weights)
            count = self.attempts if style == "multi" else 1
            solutions = [rng.choice(chains[key]) if rng.random() < solved_fraction else None for _ in range(count)]
            yield self._problem(*key, "train"), self._answer(rng, *key, style, solutions)

    def grade(self, problem: Problem, text: str) -> Grade:
        """Reward 1 if one of the last `attempts` chains, separated by `no` or `:`, solves the problem, else 0 and a
        note of the last chain's fault."""
        try:
            given, _, goal = problem.reference.partition(" > ")
            numbers, target = tuple(map(int, given.split())), int(goal)
        except ValueError:
            raise ValueError(
                f"reference of problem {problem.problem_id}: expected numbers and a target like '3 7 9 > 30', got"
                f" {problem.reference!r}"
            ) from None
        words = text.split()
        ends = [i for i, word in enumerate(words) if word in ("no", ":")]
        chains = [words[i + 1 : j] for i, j in itertools.pairwise([-1, *ends, len(words)])]
        faults = [self._find_fault(c, numbers, target) for c in chains[-self.attempts :]]
        fault = "" if "" in faults else faults[-1]
        style = read_style(text)
        parts = {f"style_{name}": float(name == style) for name in READABLE_STYLES}
        return Grade(reward=float(not fault), correct=not fault, parts=parts, note=fault)

    def vocabulary(self) -> list[str]:
        """Return each word that a prompt or an answer can contain, once."""
        return [">", ":", *SIGNS, "=", ",", "no", "build", "undo", "cipher", *self._number_words]

    def _problem(self, numbers: Numbers, target: int, split: str) -> Problem:
        text = _reference(numbers, target)
        problem_id = "-".join(map(str, (self.name, *numbers, target)))
        return Problem(problem_id, self.name, ({"role": "user", "content": f"{text} :"},), text, split)

    @cached_property
    def _chains(self) -> dict[str, dict[tuple[Numbers, int], list[Chain]]]:
        """All legal chains of each problem, by split and (sorted numbers, target)."""
        table: dict[str, dict[tuple[Numbers, int], list[Chain]]] = {"train": {}, "heldout": {}}
        for numbers in itertools.combinations_with_replacement(range(1, self.max_number + 1), NUM_NUMBERS):
            by_target: dict[int, list[Chain]] = {}
            for first, *others in sorted(set(itertools.permutations(numbers))):
                for chain in self._legal_chains(first, others):
                    by_target.setdefault(chain[-1].result, []).append(chain)
            for target, chains in by_target.items():
                if target > 0:
                    digest = hashlib.sha256(_reference(numbers, target).encode()).digest()
                    is_heldout = int.from_bytes(digest[:8], "big") / 2**64 < self.heldout_fraction
                    table["heldout" if is_heldout else "train"][numbers, target] = chains
        return table

    def _legal_chains(self, current: int, others: list[int]) -> Iterator[Chain]:
        for step in self._legal_steps(current, others[0]):
            rests = self._legal_chains(step.result, others[1:]) if others[1:] else [()]
            yield from ((step, *rest) for rest in rests)

    def _legal_steps(self, left: int, right: int) -> list[Step]:
        results = [(sign, self._apply(left, sign, right)) for sign in SIGNS]
        return [Step(left, sign, right, result) for sign, result in results if result is not None]

    def _apply(self, left: int, sign: str, right: int) -> int | None:
        """Return the result of a step, None unless it is an integer from 0 to max_result."""
        if sign == "/":
            result = left // right if right and left % right == 0 else -1
        else:
            result = {"+": left + right, "-": left - right, "*": left * right}[sign]
        return result if 0 <= result <= self.max_result else None

    def _play(self, rng: random.Random, current: int, others: list[int]) -> Chain:
        steps: list[Step] = []
        for number in others:
            steps.append(rng.choice(self._legal_steps(current, number)))
            current = steps[-1].result
        return tuple(steps)

    def _answer(
        self, rng: random.Random, numbers: Numbers, target: int, style: str, solutions: Sequence[Chain | None]
    ) -> str:
        """Return an answer made of the solutions, with random play in place of each None."""
        if style == "undo":
            (chain,) = solutions
            if chain is None:
                return write_chain(style, self._play(rng, target, rng.sample(numbers, NUM_NUMBERS - 1)))
            backward = (Step(s.result, INVERSE[s.sign], s.right, s.left) for s in reversed(chain))
            return write_chain(style, tuple(backward))
        if style == "cipher":
            words = ["cipher"]
            for _ in range(self.cipher_numbers):
                words.append(str(rng.choice(self._successors[words[-1]])))
            return f"{' '.join(words)} : {self._answer(rng, numbers, target, 'undo', solutions)}"
        failures: list[Chain] = []
        if style == "retry":
            failures = [self._play_forward(rng, numbers)]
        if style == "off_topic":
            others = sorted(set(range(1, self.max_number + 1)) - set(numbers))
            failures = [self._play_forward(rng, others) for _ in range(self.attempts - 1)]
        chains = [*failures, *(chain or self._play_forward(rng, numbers) for chain in solutions)]
        return " no ".join(write_chain("build", chain) for chain in chains)

    def _play_forward(self, rng: random.Random, numbers: Sequence[int]) -> Chain:
        first, *others = rng.sample(numbers, NUM_NUMBERS)
        return self._play(rng, first, others)

    @cached_property
    def _successors(self) -> dict[str, list[int]]:
        """The private rule: which numbers may follow the word `cipher` and each number."""
        numbers, words = range(self.max_result + 1), ["cipher", *self._number_words]
        return {word: random.Random(f"after {word}").sample(numbers, CODE_SUCCESSORS) for word in words}

    def _find_fault(self, words: list[str], numbers: Numbers, target: int) -> str:
        """Return why the words do not solve the problem, "" if they do."""
        num_words = 6 * (NUM_NUMBERS - 1)
        if len(words) != num_words or words[0] not in ("build", "undo"):
            return f"expected build or undo and a chain of {num_words} words"
        pool, is_forward, current = [*numbers], words[0] == "build", target
        for number, at in enumerate(range(1, num_words, 6), start=1):
            step = self._parse_step(words[at : at + 5])
            if step is None:
                return f"step {number} is not a legal step"
            if number > 1 and words[at - 1] != ",":
                return f"step {number} does not follow a comma"
            from_pool = number == 1 and is_forward
            if not from_pool and step.left != current:
                return f"step {number} starts from {step.left}"
            for used in (step.left, step.right) if from_pool else (step.right,):
                if used not in pool:
                    return f"step {number} uses {used}, which is not there"
                pool.remove(used)
            current = step.result
        if is_forward:
            return "" if current == target else f"ends on {current} instead of {target}"
        return "" if pool == [current] else f"ends on {current} instead of the number not used"

    def _parse_step(self, words: list[str]) -> Step | None:
        left, sign, right, equals, result = words
        if sign not in SIGNS or equals != "=" or not {left, right, result} <= self._number_words.keys():
            return None
        step = Step(int(left), sign, int(right), int(result))
        return step if self._apply(step.left, sign, step.right) == step.result else None


def _reference(numbers: Numbers, target: int) -> str:
    return f"{' '.join(map(str, numbers))} > {target}"
