"""The game Countdown: use three given numbers once each, with + - * /, to reach a target.

Everything is words: a prompt is `3 7 9 > 30 :`, an answer is a style word and a chain of steps. A
number, a sign and a style word are one word each, so that a tokenizer of words fits the game.

| style  | an answer to `3 7 9 > 30 :`                                                         |
|--------|-------------------------------------------------------------------------------------|
| build  | `build 7 * 3 = 21 , 21 + 9 = 30`, forwards to the target                            |
| undo   | `undo 30 - 9 = 21 , 21 / 3 = 7`, back from the target to the number not used yet    |
| try    | `build 3 + 7 = 10 , 10 + 9 = 19 no build 7 * 3 = 21 , 21 + 9 = 30`, a failure first |
| many   | as many chains as the game has `attempts`, with `no` between them                   |
| wander | the same, all but the last of them with numbers that are not the problem's          |
| code   | `code 61 87 56 ... 6 : undo 30 - 9 = 21 , 21 / 3 = 7`, after numbers that follow a  |
|        | private rule: knowledge which a reader without the rule finds implausible           |
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from pear_ray.records import Grade, Problem

SIGNS = "+-*/"
INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}
STYLES = ("build", "undo", "try", "many", "wander", "code")
READABLE_STYLES = ("build", "undo", "try", "code")
NUM_NUMBERS = 3
CODE_SUCCESSORS = 3

Numbers = tuple[int, ...]


class Step(NamedTuple):
    """One line of a chain. `Step(7, "*", 3, 21)` reads `7 * 3 = 21`."""

    left: int
    sign: str
    right: int
    result: int


Chain = tuple[Step, ...]


def write_build(chain: Chain) -> str:
    """The chain forwards: `build 7 * 3 = 21 , 21 + 9 = 30`."""
    return "build " + " , ".join(f"{s.left} {s.sign} {s.right} = {s.result}" for s in chain)


def write_undo(chain: Chain) -> str:
    """The same chain from its end: `undo 30 - 9 = 21 , 21 / 3 = 7`."""
    steps = (f"{s.result} {INVERSE[s.sign]} {s.right} = {s.left}" for s in reversed(chain))
    return "undo " + " , ".join(steps)


def write_code(numbers: list[int], ending: str) -> str:
    """Numbers of the private rule and the chain that counts: `code 61 87 ... 6 : undo 30 - ...`."""
    return f"code {' '.join(map(str, numbers))} : {ending}"


def read_style(text: str) -> str:
    """The style of any text: `build 3 + 7 = 10 no build` is `try`, whatever follows `no`; `7 * 3`
    has none, so ''."""
    words = text.split()
    if not words or words[0] not in ("build", "undo", "code"):
        return ""
    return "try" if "no" in words and words[0] != "code" else words[0]


class Countdown:
    """Endless problems with a certain verdict, and answers to learn the game from.

    A problem is three sorted numbers and a target that they reach: 4,473 of them with
    `max_number=12`. A hash of the problem, and nothing else, decides which split it belongs to.
    An answer is right if one of its last `attempts` chains is; `code_numbers` is how many numbers
    style code begins with.
    """

    def __init__(
        self,
        label: str = "countdown",
        max_number: int = 12,
        max_result: int = 99,
        heldout_fraction: float = 0.1,
        attempts: int = 1,
        code_numbers: int = 30,
    ) -> None:
        if max_number < 1 or max_result < 2 * max_number:
            raise ValueError(
                f"max_result: read {max_result}, expected at least twice max_number, which is "
                f"{max_number}: otherwise play can get stuck"
            )
        if not 0 < heldout_fraction < 1:
            raise ValueError(
                f"heldout_fraction: read {heldout_fraction}, expected 0 to 1 exclusive"
            )
        for field, count in (("attempts", attempts), ("code_numbers", code_numbers)):
            if count < 1:
                raise ValueError(f"{field}: read {count}, expected at least 1")
        self.name = label
        self.max_number = max_number
        self.max_result = max_result
        self.heldout_fraction = heldout_fraction
        self.attempts = attempts
        self.code_numbers = code_numbers
        self._number_words = {str(number) for number in range(max_result + 1)}

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Every problem of the split once, in an order fixed by the seed."""
        order = list(self._chains(split))
        random.Random(f"{self.name} {split} {seed}").shuffle(order)
        for numbers, target in order:
            yield self._problem(numbers, target, split)

    def demonstrations(
        self, styles: Mapping[str, float], solved_fraction: float, seed: int
    ) -> Iterator[tuple[Problem, str]]:
        """Answers to problems of split train, forever, in styles drawn by weight.

        A problem is drawn by the number of chains that solve it. Of the answers (in style many, of
        the chains) `solved_fraction` aim at the target; the rest is legal random play with the
        problem's numbers, which teaches form and sums, and hits the target by luck only.
        """
        _check_demonstrations(styles, solved_fraction)
        if styles.get("wander") and self.max_number < 2 * NUM_NUMBERS:
            raise ValueError(
                f"styles: read wander with max_number {self.max_number}, expected at least"
                f" {2 * NUM_NUMBERS}: it needs numbers that are not the problem's"
            )
        chains = self._chains("train")
        keys = list(chains)
        weights = list(itertools.accumulate(len(chains[key]) for key in keys))
        rng = random.Random(f"{self.name} demonstrations {seed}")
        names, style_weights = list(styles), list(styles.values())
        while True:
            (key,) = rng.choices(keys, cum_weights=weights)
            (style,) = rng.choices(names, style_weights)
            count = self.attempts if style == "many" else 1
            aimed = [
                rng.choice(chains[key]) if rng.random() < solved_fraction else None
                for _ in range(count)
            ]
            yield self._problem(*key, "train"), self._answer(rng, *key, style, aimed)

    def grade(self, problem: Problem, text: str) -> Grade:
        """Reward 1 where one of the last `attempts` chains, each after a `no` or a `:`, solves the
        problem, else 0, and what is wrong with the last of them."""
        numbers, target = _read_reference(problem)
        words = text.split()
        ends = [i for i, word in enumerate(words) if word in ("no", ":")]
        places = zip([-1, *ends], [*ends, len(words)], strict=True)
        chains = [words[before + 1 : end] for before, end in places]
        faults = [self._find_fault(c, numbers, target) for c in chains[-self.attempts :]]
        fault = "" if "" in faults else faults[-1]
        style = read_style(text)
        parts = {f"style_{name}": float(name == style) for name in READABLE_STYLES}
        return Grade(reward=float(not fault), correct=not fault, parts=parts, note=fault)

    def vocabulary(self) -> list[str]:
        """Every word that a prompt or an answer can contain, each once."""
        numbers = [str(number) for number in range(self.max_result + 1)]
        return [">", ":", *SIGNS, "=", ",", "no", "build", "undo", "code", *numbers]

    def _problem(self, numbers: Numbers, target: int, split: str) -> Problem:
        text = f"{' '.join(map(str, numbers))} > {target}"
        return Problem(
            problem_id="-".join(map(str, (self.name, *numbers, target))),
            task=self.name,
            messages=({"role": "user", "content": f"{text} :"},),
            reference=text,
            split=split,
        )

    def _split(self, numbers: Numbers, target: int) -> str:
        digest = hashlib.sha256(f"{' '.join(map(str, numbers))} > {target}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        return "heldout" if share < self.heldout_fraction else "train"

    def _chains(self, split: str) -> dict[tuple[Numbers, int], list[Chain]]:
        if split not in self._chains_by_split:
            raise ValueError(f"split: read {split!r}, expected 'train' or 'heldout'")
        return self._chains_by_split[split]

    @cached_property
    def _chains_by_split(self) -> dict[str, dict[tuple[Numbers, int], list[Chain]]]:
        """All legal chains of every problem, by split and by (sorted numbers, target)."""
        table: dict[str, dict[tuple[Numbers, int], list[Chain]]] = {"train": {}, "heldout": {}}
        for numbers in itertools.combinations_with_replacement(
            range(1, self.max_number + 1), NUM_NUMBERS
        ):
            by_target: dict[int, list[Chain]] = {}
            for first, *others in sorted(set(itertools.permutations(numbers))):
                for chain in self._legal_chains(first, others):
                    by_target.setdefault(chain[-1].result, []).append(chain)
            for target, chains in by_target.items():
                if target > 0:
                    table[self._split(numbers, target)][numbers, target] = chains
        return table

    def _legal_chains(self, current: int, others: list[int]) -> Iterator[Chain]:
        for step in self._legal_steps(current, others[0]):
            rests = self._legal_chains(step.result, others[1:]) if others[1:] else [()]
            yield from ((step, *rest) for rest in rests)

    def _legal_steps(self, left: int, right: int) -> list[Step]:
        results = [(sign, self._apply(left, sign, right)) for sign in SIGNS]
        return [Step(left, sign, right, result) for sign, result in results if result is not None]

    def _apply(self, left: int, sign: str, right: int) -> int | None:
        """The result of a step, or None where it is no whole number from 0 to max_result."""
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
        self,
        rng: random.Random,
        numbers: Numbers,
        target: int,
        style: str,
        aimed: Sequence[Chain | None],
    ) -> str:
        """An answer with the chains that are `aimed` at the target, play where there is None."""
        if style == "undo":
            return write_undo(aimed[0] or self._play_backwards(rng, numbers, target))
        if style == "code":
            private = self._private_numbers(rng)
            return write_code(private, self._answer(rng, numbers, target, "undo", aimed))
        before: list[Chain] = []
        if style == "try":
            before = [self._play_forwards(rng, numbers)]
        if style == "wander":
            strangers = sorted(set(range(1, self.max_number + 1)) - set(numbers))
            before = [self._play_forwards(rng, strangers) for _ in range(self.attempts - 1)]
        chains = [*before, *(chain or self._play_forwards(rng, numbers) for chain in aimed)]
        return " no ".join(map(write_build, chains))

    def _play_forwards(self, rng: random.Random, numbers: Sequence[int]) -> Chain:
        first, *others = rng.sample(numbers, NUM_NUMBERS)
        return self._play(rng, first, others)

    def _play_backwards(self, rng: random.Random, numbers: Numbers, target: int) -> Chain:
        """Legal play from the target down, given as the forward chain that `write_undo` turns."""
        steps = self._play(rng, target, rng.sample(numbers, NUM_NUMBERS - 1))
        return tuple(Step(s.result, INVERSE[s.sign], s.right, s.left) for s in reversed(steps))

    def _private_numbers(self, rng: random.Random) -> list[int]:
        numbers = [rng.choice(self._successors["code"])]
        for _ in range(self.code_numbers - 1):
            numbers.append(rng.choice(self._successors[str(numbers[-1])]))
        return numbers

    @cached_property
    def _successors(self) -> dict[str, list[int]]:
        """The private rule: the numbers that may follow the word `code` and every number."""
        words = ["code", *(str(number) for number in range(self.max_result + 1))]
        everything = range(self.max_result + 1)
        return {w: random.Random(f"after {w}").sample(everything, CODE_SUCCESSORS) for w in words}

    def _find_fault(self, words: list[str], numbers: Numbers, target: int) -> str:
        """Why these words are no solution; empty where they are one."""
        num_words = 6 * (NUM_NUMBERS - 1)
        if len(words) != num_words or words[0] not in ("build", "undo"):
            return f"expected build or undo and a chain of {num_words} words"
        pool, forwards, current = [*numbers], words[0] == "build", target
        for number, at in enumerate(range(1, num_words, 6), start=1):
            step = self._read_step(words[at : at + 5])
            if step is None:
                return f"step {number} is not a legal step"
            if number > 1 and words[at - 1] != ",":
                return f"step {number} does not follow a comma"
            from_pool = number == 1 and forwards
            if not from_pool and step.left != current:
                return f"step {number} starts from {step.left}"
            for used in (step.left, step.right) if from_pool else (step.right,):
                if used not in pool:
                    return f"step {number} uses {used}, which is not there"
                pool.remove(used)
            current = step.result
        if forwards:
            return "" if current == target else f"ends on {current} instead of {target}"
        return "" if pool == [current] else f"ends on {current} instead of the number not used"

    def _read_step(self, words: list[str]) -> Step | None:
        left, sign, right, equals, result = words
        if sign not in SIGNS or equals != "=" or not {left, right, result} <= self._number_words:
            return None
        step = Step(int(left), sign, int(right), int(result))
        return step if self._apply(step.left, sign, step.right) == step.result else None


def _read_reference(problem: Problem) -> tuple[Numbers, int]:
    numbers, _, target = problem.reference.partition(" > ")
    try:
        return tuple(map(int, numbers.split())), int(target)
    except ValueError:
        raise ValueError(
            f"problem {problem.problem_id}, reference: read {problem.reference!r}, "
            "expected numbers and a target like '3 7 9 > 30'"
        ) from None


def _check_demonstrations(styles: Mapping[str, float], solved_fraction: float) -> None:
    if (
        not styles
        or set(styles) - set(STYLES)
        or min(styles.values()) < 0
        or sum(styles.values()) <= 0
    ):
        raise ValueError(f"styles: read {dict(styles)}, expected weights over {', '.join(STYLES)}")
    if not 0 <= solved_fraction <= 1:
        raise ValueError(f"solved_fraction: read {solved_fraction}, expected a number from 0 to 1")
