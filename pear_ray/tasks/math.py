"""Mathematics with known answers, from files, judged by equality of the answers' values."""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections import deque
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from pear_ray.records import Grade, Problem
from pear_ray.seeds import seed_of
from pear_ray.tasks.rows import check_files, read_rows

EXTRACTORS = ("boxed", "last_number", "either")
# Nothing longer is the answer to a problem with a known answer, and long formulas cost minutes.
MAX_ANSWER_CHARACTERS = 400
BRACES = re.compile(r"\\f?boxed\s*\{|\\.|[{}]", re.DOTALL)
NUMBER = re.compile(
    r"(?:(?<![\w)}\]])-\s?)?"
    r"(?:\\[dt]?frac\s*\{-?\d+\}\s*\{-?\d+\}"
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+(?!\d|\.\d))?"
    r"|(?<!\d)\.\d+)"
    r"(?:\s?\\?%)?"
)


class Row(NamedTuple):
    """`Row("What is 6 * 7?", "42", "train")`."""

    problem: str
    answer: str
    split: str


class Math:
    r"""`Math("data/problems.jsonl.gz")`: rows with a problem and its answer.

    Args:
        path: A file of Parquet or JSON lines (plain, .gz, .zst), or a folder of such.
        label: The task's name, part of the problems' ids.
        problem: Column of the problem, text.
        answer: Column of the answer, a number or text; of a text with a \boxed{} in it (a worked
            solution) the last one counts.
        split: Column that says "train" or "heldout". Without it `heldout_fraction` of the problems
            are held out, by a hash of the problem.
        system: System prompt; none where it is empty.
        instruction: What stands below each problem, such as where to put the answer.
        extractor: Which answer of a text decides: that of the last "boxed", the "last_number", or
            "either", where it is enough that one of them is right.

    A problem counts once, with the answer of its first row; where its rows are on both sides of
    the split it is held out.

    Raises:
        ImportError: math-verify is not installed.
        ValueError: an option cannot be used.
    """

    def __init__(
        self,
        path: str,
        label: str = "math",
        problem: str = "problem",
        answer: str = "answer",
        split: str | None = None,
        heldout_fraction: float = 0.1,
        system: str = "",
        instruction: str = "",
        extractor: str = "boxed",
    ) -> None:
        if extractor not in EXTRACTORS:
            raise ValueError(
                f"extractor: read {extractor!r}, expected one of {', '.join(EXTRACTORS)}"
            )
        if not 0 < heldout_fraction < 1:
            raise ValueError(
                f"heldout_fraction: read {heldout_fraction}, expected 0 to 1 exclusive"
            )
        import math_verify  # noqa: F401  A verifier without it must not start.

        # It would say of each process that its own timer is off; the verifier's is on.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self.name = label
        self._path = path
        self._columns = [problem, answer] if split is None else [problem, answer, split]
        self._heldout_fraction = heldout_fraction
        self._system = system
        self._instruction = instruction
        self._extractor = extractor

    def check_files(self) -> None:
        """Look for the files, without reading them.

        Raises:
            ValueError: nothing is there that can be read.
        """
        check_files(self._path)

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Every problem of the split once, in an order fixed by the seed.

        Raises:
            ConfigError: a file cannot be read, or a row is not as it should be.
        """
        if split not in ("train", "heldout"):
            raise ValueError(f"split: read {split!r}, expected 'train' or 'heldout'")
        order = [row for row in self._rows if row.split == split]
        random.Random(f"{self.name} {split} {seed}").shuffle(order)
        for row in order:
            yield self._problem(row)

    def grade(self, problem: Problem, text: str) -> Grade:
        """Reward 1 where the extracted answer has the value of the reference, by math-verify.

        `parts`: boxed_correct, last_number_correct, answered (there is an answer where the
        extractor looks) and extractors_disagree (one is right and one is wrong). Without a time
        limit of its own: math-verify's `signal.alarm` would switch off the verifier's timer.
        """
        found = {"boxed": last_boxed(text), "last_number": last_number(text)}
        faults = {name: find_fault(answer, problem.reference) for name, answer in found.items()}
        decide = [name for name in found if self._extractor in (name, "either")]
        correct = any(not faults[name] for name in decide)
        parts = {
            "boxed_correct": float(not faults["boxed"]),
            "last_number_correct": float(not faults["last_number"]),
            "answered": float(any(found[name] is not None for name in decide)),
            "extractors_disagree": float(bool(faults["boxed"]) != bool(faults["last_number"])),
        }
        note = "" if correct else "; ".join(f"{name}: {faults[name]}" for name in decide)
        return Grade(float(correct), correct, parts, note)

    def _problem(self, row: Row) -> Problem:
        question = f"{row.problem}\n\n{self._instruction}" if self._instruction else row.problem
        system = ({"role": "system", "content": self._system},) if self._system else ()
        return Problem(
            problem_id=f"{self.name}-{hashlib.sha256(row.problem.encode()).hexdigest()[:16]}",
            task=self.name,
            messages=(*system, {"role": "user", "content": question}),
            reference=row.answer,
            split=row.split,
        )

    @cached_property
    def _rows(self) -> list[Row]:
        rows: dict[str, Row] = {}
        for place, values in read_rows(self._path, self._columns):
            row = self._row(place, *values)
            first = rows.setdefault(row.problem, row)
            if row.split == "heldout" != first.split:
                rows[row.problem] = first._replace(split="heldout")
        return list(rows.values())

    def _row(self, place: str, problem: Any, answer: Any, split: Any = None) -> Row:
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError(f"{place}, {self._columns[0]}: read {problem!r}, expected text")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(
                f"{place}, {self._columns[1]}: read {answer!r}, expected a number or text"
            )
        known = str(answer).strip()
        known = last_boxed(known) or known
        if not known or len(known) > MAX_ANSWER_CHARACTERS:
            raise ValueError(
                f"{place}, {self._columns[1]}: read {known[:60]!r}, {len(known)} characters;"
                f" expected 1 to {MAX_ANSWER_CHARACTERS}, or a text with a \\boxed{{}} of so many"
            )
        if len(self._columns) == 2:
            heldout = seed_of(problem.strip()) < self._heldout_fraction * 2**31
            split = "heldout" if heldout else "train"
        if split not in ("train", "heldout"):
            raise ValueError(
                f"{place}, {self._columns[2]}: read {split!r}, expected 'train' or 'heldout'"
            )
        return Row(problem.strip(), known, split)


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{} that is closed, and has none in it: `3` for `\boxed{2}` and
    `\boxed{x = \boxed{3}}`. None where there is none."""
    opened: list[tuple[int, bool]] = []
    found: tuple[int, int] | None = None
    for match in BRACES.finditer(text):
        token = match.group()
        if token.endswith("{") and token != "\\{":
            opened.append((match.end(), token != "{"))
        elif token == "}" and opened:
            start, is_box = opened.pop()
            if is_box and (found is None or found[0] < start):
                found = start, match.start()
    return None if found is None else text[slice(*found)].strip()


def last_number(text: str) -> str | None:
    r"""The last number of a text: `-1,234.5`, `3/4`, `\frac{3}{4}` or `12.5%`; a minus behind a
    number, a letter or a bracket is none of it. None where there is none."""
    last = deque(NUMBER.finditer(text), maxlen=1)
    return last[0].group() if last else None


@lru_cache(maxsize=4096)
def find_fault(answer: str | None, reference: str) -> str:
    """Why an answer is not right; empty where its value is that of the reference."""
    from math_verify import verify

    if answer is None:
        return "no answer"
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return f"{len(answer)} characters; expected at most {MAX_ANSWER_CHARACTERS}"
    expected, read = _values(reference), _values(answer)
    if verify(expected, read, timeout_seconds=None):
        return ""
    return f"read {answer!r}, expected {reference!r}"


def _values(answer: str) -> list[Any]:
    """What math-verify reads in an answer: its value, if it has one, and the text itself."""
    from math_verify import LatexExtractionConfig, parse

    box = f"\\boxed{{{answer.strip().rstrip('.,;')}}}"
    found: list[Any] = parse(
        box, [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None
    )
    return found
