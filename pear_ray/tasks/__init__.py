"""Tasks: families of problems whose answers can be graded.

A job lists its tasks as `[[tasks]]` entries; `name` selects the class:

| name                   | class                                                             |
|------------------------|-------------------------------------------------------------------|
| "countdown"            | `countdown.Countdown`: an arithmetic game, generated              |
| "math"                 | `math.Math`: problems from files, graded by math-verify           |
| "reasoning_gym"        | `reasoning_gym.ReasoningGym`: any dataset of reasoning-gym        |
| an entry point         | a class that an installed package offers in group `pear_ray.tasks` |
| "package.module:Class" | any other class that follows `Task`                               |

`options` are the keyword arguments of its constructor, and `weight` is the task's share of the training problems.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from importlib.metadata import EntryPoint, entry_points
from itertools import count, islice
from math import lcm
from typing import Any, Protocol, runtime_checkable

from pear_ray.config import TaskSpec
from pear_ray.errors import ConfigError, require
from pear_ray.records import Grade, Problem
from pear_ray.statistics import seed_of

ENTRY_POINT_GROUP = "pear_ray.tasks"
BUILT_IN = {
    "countdown": "pear_ray.tasks.countdown:Countdown",
    "math": "pear_ray.tasks.math:Math",
    "reasoning_gym": "pear_ray.tasks.reasoning_gym:ReasoningGym",
}


class Task(Protocol):
    """A family of problems with verifiable answers, constructed in each process that uses it."""

    name: str  # the `task` of its problems; the reward worker finds the grader of an answer by it

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Yield distinct problems of `split`, "train" or "heldout", in an order fixed by `seed`."""

    def grade(self, problem: Problem, text: str) -> Grade:
        """Grade an answer. Never raises on account of the text."""


@runtime_checkable
class Demonstrator(Protocol):
    """A task that can also write answers, so that a model can be pretrained from scratch."""

    def vocabulary(self) -> list[str]:
        """Return every word that a prompt or an answer can contain."""

    def demonstrations(
        self, styles: Mapping[str, float], solved_fraction: float, seed: int
    ) -> Iterator[tuple[Problem, str]]:
        """Yield (problem of split "train", answer) forever; `styles` maps styles to weights."""


@runtime_checkable
class FileBacked(Protocol):
    """A task that reads its problems from files, which grading does not need."""

    def check_files(self) -> None:
        """Raise ValueError if files are missing or of an unknown format; reads none of them."""


def make_tasks(specs: Sequence[TaskSpec]) -> list[Task]:
    """Construct the tasks of a job, in its order, ready to yield problems. Raise ConfigError as `make_graders`, if a
    task's file is missing, or if two tasks share a name, so that the grader of a problem would be ambiguous."""
    tasks = make_graders(specs)
    for number, task in enumerate(tasks):
        if isinstance(task, FileBacked):
            try:
                task.check_files()
            except ValueError as error:
                raise ConfigError(f"tasks.{number}.options: {error}") from error
        earlier = [other.name for other in tasks[:number]]
        if task.name in earlier:
            raise ConfigError(
                f"tasks.{number}.options.label: expected a task name of its own, got {task.name!r},"
                f" the name of tasks.{earlier.index(task.name)}"
            )
    return tasks


def make_graders(specs: Sequence[TaskSpec]) -> list[Task]:
    """Construct the tasks of a job for grading alone: files of problems may be missing. Raise ConfigError if a name
    selects no class, or a class that is no task or rejects its options."""
    return [_make_grader(f"tasks.{number}", spec) for number, spec in enumerate(specs)]


def _make_grader(field: str, spec: TaskSpec) -> Task:
    task_class = _load_class(f"{field}.name", spec.name)
    try:
        task: Task = task_class(**spec.options)
    except ImportError as error:
        raise ConfigError(
            f"{field}.name: expected the packages that {spec.name!r} needs, which pear-ray[tasks]"
            f" installs for built-in tasks, got {type(error).__name__}: {error}"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field}.options: {error}") from error
    name = getattr(task, "name", None)
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{field}.name: expected a task whose `name` is a non-empty string, got {name!r} of {spec.name!r}"
        )
    return task


def endless_problems(specs: Sequence[TaskSpec], split: str, seed: int) -> Iterator[tuple[int, Problem]]:
    """Yield (epoch, problem) forever: the tasks mixed by weight, each epoch in its own order. The stream depends on the
    arguments alone, so a resumed run needs only its position in it. Raise ValueError if a task has no such problem."""
    tasks, weights = make_tasks(specs), [spec.weight for spec in specs]
    for epoch in count():
        problem = None
        for problem in mixed_problems(tasks, split, seed + epoch, weights):
            yield epoch, problem
        if problem is None:
            raise ValueError(f"tasks: expected problems of split {split!r} in each task, got none")


def heldout_problems(specs: Sequence[TaskSpec], num_each: int, seed: int) -> list[Problem]:
    """Return `num_each` held-out problems of each task, the same for every evaluation with `seed`. Raise ConfigError if
    a task holds out fewer."""
    stream = mixed_problems(make_tasks(specs), "heldout", seed_of(seed, "evaluate"))
    problems = list(islice(stream, num_each * len(specs)))
    expected = f"at most {len(problems) // len(specs)}, the number of problems that each task holds out"
    require(len(problems) == num_each * len(specs), "evaluation.num_problems", expected, num_each)
    return problems


def mixed_problems(
    tasks: Sequence[Task], split: str, seed: int, weights: Sequence[float] | None = None
) -> Iterator[Problem]:
    """Yield one epoch: distinct problems of all tasks, in an order fixed by `seed`.

    The next problem is always of the task that is furthest behind its share p = weight / sum of weights, the first of
    them if several are: round robin if weights are equal or None. The epoch ends after T problems, the largest T for
    which every task has T * p problems. The rest of a larger task comes in other epochs, whose order differs.
    """
    streams = [task.problems(split, seed) for task in tasks]
    # Integers in exactly the ratio of the weights: sums of them do not round.
    exact = [Fraction(weight) for weight in weights or [1] * len(tasks)]
    shares = [int(weight * lcm(*(other.denominator for other in exact))) for weight in exact]
    total = sum(shares)
    buffers: list[deque[Problem]] = [deque() for _ in streams]
    num_yielded = [0] * len(streams)
    for length in count(1):
        for number, stream in enumerate(streams):
            while (num_yielded[number] + len(buffers[number])) * total < length * shares[number]:
                problem = next(stream, None)
                if problem is None:
                    return
                buffers[number].append(problem)
        behind = [length * share - yielded * total for share, yielded in zip(shares, num_yielded, strict=True)]
        chosen = behind.index(max(behind))
        num_yielded[chosen] += 1
        yield buffers[chosen].popleft()


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is "train" or "heldout"."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split: expected 'train' or 'heldout', got {split!r}")


def check_heldout_fraction(fraction: float) -> None:
    """Raise ValueError unless 0 < fraction < 1."""
    if not 0 < fraction < 1:
        raise ValueError(f"heldout_fraction: expected a number in (0, 1), got {fraction}")


def split_by_hash(text: str, heldout_fraction: float) -> str:
    """Return the split of a problem, which depends on its text alone."""
    return "heldout" if seed_of(text) < heldout_fraction * 2**31 else "train"


def _load_class(field: str, name: str) -> type[Any]:
    """Return the class that a task's name selects; ConfigError if none, two, not importable, or no task."""
    entry = EntryPoint(name, _object_reference(field, name), ENTRY_POINT_GROUP)
    try:
        loaded = entry.load()
    except Exception as error:  # Importing a user's module may raise anything.
        raise ConfigError(
            f"{field}: expected a class that can be imported, got {name!r} ({entry.value}:"
            f" {type(error).__name__}: {error})"
        ) from error
    missing = [m for m in ("problems", "grade") if not callable(getattr(loaded, m, None))]
    if not isinstance(loaded, type) or missing:
        fault = f"without {' and '.join(missing)}" if missing else "which is no class"
        raise ConfigError(
            f"{field}: expected a class with problems(split, seed) and grade(problem, text), got {entry.value} {fault}"
        )
    return loaded


def _object_reference(field: str, name: str) -> str:
    """Return `package.module:Class` for a name; built-in tasks win over installed packages'."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, colon, attribute = name.partition(":")
    if colon and all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        return name
    installed = entry_points(group=ENTRY_POINT_GROUP)
    references = sorted({entry.value for entry in installed if entry.name == name})
    if len(references) == 1:
        return references[0]
    if references:
        raise ConfigError(
            f"{field}: expected one of {', '.join(references)}, got {name!r}, which"
            f" {len(references)} installed packages offer"
        )
    known = sorted({*BUILT_IN, *(entry.name for entry in installed)})
    raise ConfigError(
        f"{field}: expected one of {', '.join(map(repr, known))}, or 'package.module:Class', got {name!r}"
    )
