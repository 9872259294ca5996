"""Families of problems, by the name a job gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count

from pear_ray.config import BadInput, TaskSpec
from pear_ray.records import Problem
from pear_ray.tasks.arithmetic import Countdown
from pear_ray.tasks.gym import ReasoningGym
from pear_ray.tasks.task import Task

FAMILIES = {"countdown": Countdown, "reasoning_gym": ReasoningGym}


def make_tasks(specs: Sequence[TaskSpec]) -> list[Task]:
    """The tasks of a job.

    Raises:
        BadInput: an option which the family does not know.
    """
    tasks: list[Task] = []
    for number, spec in enumerate(specs):
        family: Callable[..., Task] = FAMILIES[spec.name]
        try:
            tasks.append(family(**spec.options))
        except (TypeError, ValueError) as error:
            raise BadInput(f"tasks.{number}.options: read {spec.options}; {error}") from error
    return tasks


def mixed_problems(tasks: Sequence[Task], split: str, seed: int) -> Iterator[Problem]:
    """Problems of all tasks in turn, in an order fixed by `seed`, until one task has no more."""
    streams = [task.problems(split, seed) for task in tasks]
    for together in zip(*streams, strict=False):
        yield from together


def endless_problems(tasks: Sequence[Task], split: str, seed: int) -> Iterator[tuple[int, Problem]]:
    """(epoch, problem), epoch after epoch, each in an order of its own."""
    for epoch in count():
        empty = True
        for problem in mixed_problems(tasks, split, seed + epoch):
            empty = False
            yield epoch, problem
        if empty:
            raise ValueError(f"tasks: no problem of split {split!r}; expected at least one each")
