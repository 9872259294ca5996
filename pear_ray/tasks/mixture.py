"""Problems of several tasks as one stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import count, islice
from math import lcm

from pear_ray.config import TaskSpec
from pear_ray.errors import ConfigError
from pear_ray.records import Problem
from pear_ray.seeds import seed_of
from pear_ray.tasks.registry import make_tasks
from pear_ray.tasks.task import Task


def endless_problems(
    specs: Sequence[TaskSpec], split: str, seed: int
) -> Iterator[tuple[int, Problem]]:
    """(epoch, problem), epoch after epoch of the tasks mixed by weight, each epoch in an order of
    its own. The stream depends on the arguments and on nothing else, so that a place in it is all
    that a resumed run needs.

    Raises:
        ConfigError: as `make_tasks`.
        ValueError: a task has no problem of the split.
    """
    tasks, weights = make_tasks(specs), [spec.weight for spec in specs]
    for epoch in count():
        empty = True
        for problem in mixed_problems(tasks, split, seed + epoch, weights):
            empty = False
            yield epoch, problem
        if empty:
            raise ValueError(f"tasks: no problem of split {split!r}; expected at least one each")


def heldout_problems(specs: Sequence[TaskSpec], num_each: int, seed: int) -> list[Problem]:
    """Held-out problems, as many of each task: those that every evaluation with this seed asks.

    Raises:
        ConfigError: there are not so many.
    """
    stream = mixed_problems(make_tasks(specs), "heldout", seed_of(seed, "evaluate"))
    problems = list(islice(stream, num_each * len(specs)))
    if len(problems) < num_each * len(specs):
        raise ConfigError(
            f"evaluation.num_problems: read {num_each}; the tasks hold out only"
            f" {len(problems) // len(specs)} each; expected at most as many"
        )
    return problems


def mixed_problems(
    tasks: Sequence[Task], split: str, seed: int, weights: Sequence[float] | None = None
) -> Iterator[Problem]:
    """One epoch: distinct problems of all tasks, in an order fixed by `seed`.

    The next problem is always of the task that is furthest behind its share p = weight / sum of
    weights, the first of them where several are; without weights, or with equal ones, of each in
    turn. The epoch ends after T problems, the most for which every task has the T * p that are its
    share: problems that a larger task still has wait for another epoch, whose order differs.
    """
    streams = [task.problems(split, seed) for task in tasks]
    shares = _whole_numbers(weights or [1.0] * len(tasks))
    total = sum(shares)
    ahead: list[deque[Problem]] = [deque() for _ in streams]
    given = [0] * len(streams)
    for length in count(1):
        for stream, share, drawn, taken in zip(streams, shares, ahead, given, strict=True):
            while (taken + len(drawn)) * total < length * share:
                problem = next(stream, None)
                if problem is None:
                    return
                drawn.append(problem)
        behind = [
            length * share - taken * total for share, taken in zip(shares, given, strict=True)
        ]
        chosen = behind.index(max(behind))
        given[chosen] += 1
        yield ahead[chosen].popleft()


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the very proportions of `weights`: sums of them do not round."""
    exact = [Fraction(weight) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    return [int(weight * scale) for weight in exact]
