"""Math problems from files, graded by equality of values (math-verify)."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.errors import ConfigError
from pear_ray.records import Grade, Problem
from pear_ray.tasks import check_heldout_fraction, check_split, split_by_hash

EXTRACTORS = ("boxed", "last_number", "either")
MAX_ANSWER_CHARACTERS = 400  # No known answer is longer, and math-verify takes minutes for long formulas.
JSON_SUFFIXES = tuple(kind + packed for kind in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst"))
BRACES = re.compile(r"\\f?boxed\s*\{|\\.|[{}]", re.DOTALL)
NUMBER = re.compile(
    r"(?:(?<![\w)}\]])-\s?)?"
    r"(?:\\[dt]?frac\s*\{-?\d+\}\s*\{-?\d+\}"
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+(?!\d|\.\d))?"
    r"|(?<!\d)\.\d+)"
    r"(?:\s?\\?%)?"
)


@dataclass(eq=False)
class Math:
    """`Math("data/problems.jsonl.gz")`: rows of a problem and its answer. Rows with the same problem are one problem,
    with the answer of the first row, and held out if one of them is."""

    path: str  # a file of Parquet or JSON lines (plain, .gz, .zst), or a folder of such files
    label: str = "math"  # the task's name, part of the problems' ids
    problem: str = "problem"  # column of the problem, text
    # Column of the answer, a number or text; of a text with \\boxed{}, the last \\boxed{} counts.
    answer: str = "answer"
    split: str | None = None  # column with "train" or "heldout"; without it, a hash of the problem decides
    heldout_fraction: float = 0.1  # of the problems, if no column decides
    system: str = ""  # system prompt, "" for none
    instruction: str = ""  # text below each problem, such as the answer's format
    extractor: str = "boxed"  # the graded part: the last "boxed", the "last_number", or "either", if one is correct

    def __post_init__(self) -> None:
        if self.extractor not in EXTRACTORS:
            raise ValueError(f"extractor: expected one of {', '.join(EXTRACTORS)}, got {self.extractor!r}")
        check_heldout_fraction(self.heldout_fraction)
        import math_verify  # noqa: F401  Fail here, not at the first answer.

        # math-verify warns in each process that its own timeout is off; the reward worker has one.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self.name = self.label
        self._columns = [self.problem, self.answer, *([] if self.split is None else [self.split])]

    def check_files(self) -> None:
        """Raise ConfigError if no readable file is found, without reading one."""
        find_files(self.path)

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Yield each problem of the split once, in an order fixed by the seed. Raise ValueError if a file cannot be
        read or a row is invalid."""
        check_split(split)
        order = [problem for problem in self._problems if problem.split == split]
        random.Random(f"{self.name} {split} {seed}").shuffle(order)
        yield from order

    def grade(self, problem: Problem, text: str) -> Grade:
        """Reward 1 if the extracted answer has the value of the reference, else 0.

        `parts`: boxed_correct, last_number_correct, answered (the extractor finds an answer) and extractors_disagree
        (only one of the two is correct). Sets no timeout: math-verify's `signal.alarm` would cancel the reward worker's
        timer.
        """
        answers = {"boxed": last_boxed(text), "last_number": last_number(text)}
        faults = {name: find_fault(answer, problem.reference) for name, answer in answers.items()}
        graded = [name for name in answers if self.extractor in (name, "either")]
        correct = any(not faults[name] for name in graded)
        parts = {
            "boxed_correct": float(not faults["boxed"]),
            "last_number_correct": float(not faults["last_number"]),
            "answered": float(any(answers[name] is not None for name in graded)),
            "extractors_disagree": float(bool(faults["boxed"]) != bool(faults["last_number"])),
        }
        note = "" if correct else "; ".join(f"{name}: {faults[name]}" for name in graded)
        return Grade(float(correct), correct, parts, note)

    @cached_property
    def _problems(self) -> list[Problem]:
        problems: dict[str, Problem] = {}
        for location, values in read_rows(self.path, self._columns):
            problem = self._parse_row(location, *values)
            question = problem.messages[-1]["content"]
            first = problems.setdefault(question, problem)
            if problem.split == "heldout" != first.split:
                problems[question] = replace(first, split="heldout")
        return list(problems.values())

    def _parse_row(self, location: str, problem: Any, answer: Any, split: Any = None) -> Problem:
        fields = [f"{location}, {column}" for column in self._columns]
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError(f"{fields[0]}: expected text, got {problem!r}")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(f"{fields[1]}: expected a number or text, got {answer!r}")
        known = str(answer).strip()
        known = last_boxed(known) or known
        if not known or len(known) > MAX_ANSWER_CHARACTERS:
            raise ValueError(
                f"{fields[1]}: expected 1 to {MAX_ANSWER_CHARACTERS} characters, in all or in a"
                f" \\boxed{{}}, got {len(known)}: {known[:60]!r}"
            )
        text = problem.strip()
        if self.split is None:
            split = split_by_hash(text, self.heldout_fraction)
        if split not in ("train", "heldout"):
            raise ValueError(f"{fields[2]}: expected 'train' or 'heldout', got {split!r}")
        problem_id = f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = f"{text}\n\n{self.instruction}" if self.instruction else text
        return Problem(problem_id, self.name, (*system, {"role": "user", "content": question}), known, split)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last closed, innermost \boxed{}, or None: "3" for `\boxed{2}` and `\boxed{x =
    \boxed{3}}`."""
    opened: list[tuple[int, bool]] = []
    last: tuple[int, int] | None = None
    for match in BRACES.finditer(text):
        token = match.group()
        if token.endswith("{") and token != "\\{":
            opened.append((match.end(), token != "{"))
        elif token == "}" and opened:
            start, is_box = opened.pop()
            if is_box and (last is None or last[0] < start):
                last = start, match.start()
    return None if last is None else text[slice(*last)].strip()


def last_number(text: str) -> str | None:
    r"""Return the last number of a text, or None: `-1,234.5`, `3/4`, `\frac{3}{4}` or `12.5%`. A minus sign after a
    number, a letter or a bracket is an operator."""
    last = deque(NUMBER.finditer(text), maxlen=1)
    return last[0].group() if last else None


@lru_cache(maxsize=4096)
def find_fault(answer: str | None, reference: str) -> str:
    """Return why an answer is wrong, or "" if its value is that of the reference."""
    from math_verify import verify

    if answer is None:
        return "no answer"
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return f"expected at most {MAX_ANSWER_CHARACTERS} characters, got {len(answer)}"
    if verify(_parse(reference), _parse(answer), timeout_seconds=None):
        return ""
    return f"expected {reference!r}, got {answer!r}"


def _parse(answer: str) -> list[Any]:
    """Return math-verify's parse of an answer: its value, if it has one, and the text itself."""
    from math_verify import LatexExtractionConfig, parse

    box = f"\\boxed{{{answer.strip().rstrip('.,;')}}}"
    return parse(box, [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)


def find_files(path: str) -> list[Path]:
    """Return the files of a path, sorted by name: in a folder the Parquet files or, if there are none, the JSON lines.
    Names with a leading dot or underscore are skipped. Raise ConfigError if there is no such file."""
    root = Path(path).expanduser()
    if not root.exists():
        raise ConfigError(f"path: expected a file or folder, got {path!r}, which does not exist")
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.is_file())
    shown = [file for file in files if not any(part.startswith((".", "_")) for part in file.relative_to(root).parts)]
    for suffixes in ((".parquet",), JSON_SUFFIXES):
        found = [file for file in shown if file.name.endswith(suffixes)]
        if found:
            return found
    raise ConfigError(f"path: expected a file or folder with {', '.join(('.parquet', *JSON_SUFFIXES))}, got {path!r}")


def read_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield (location, values of the columns) of each row; the location is "file:number", with lines or rows counted
    from 1. Raise ConfigError if a file cannot be read or a row lacks a column."""
    for file in find_files(path):
        read = _read_parquet if file.name.endswith(".parquet") else _read_json_lines
        try:
            for number, row in read(file, columns):
                _check_columns(f"{file}:{number}", columns, list(row))
                yield f"{file}:{number}", [row[name] for name in columns]
        except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from error


def _read_parquet(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with pq.ParquetFile(file) as parquet:
        _check_columns(str(file), columns, parquet.schema_arrow.names)
        batches = parquet.iter_batches(columns=list(columns))
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def _read_json_lines(file: Path, _: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with pa.input_stream(str(file), compression="detect") as packed:
        for number, line in enumerate(io.BufferedReader(packed), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{file}:{number}: expected JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{file}:{number}: expected an object, got {type(row).__name__}")
            yield number, row


def _check_columns(location: str, columns: Sequence[str], present: Sequence[str]) -> None:
    missing = [name for name in columns if name not in present]
    if missing:
        raise ConfigError(f"{location}: expected columns {missing}, got {sorted(present)}")
