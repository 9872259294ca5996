"""Mixtures of tasks: shares, order, epochs, and resuming from a position in the stream."""

from __future__ import annotations

from fractions import Fraction
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pear_ray.config import TaskSpec
from pear_ray.records import Grade, Problem
from pear_ray.tasks import endless_problems, make_tasks, mixed_problems


class Counted:
    """`num_problems` problems, rotated by the seed."""

    def __init__(self, label: str, num_problems: int) -> None:
        self.name = label
        self.num_problems = num_problems

    def problems(self, split, seed):
        for number in range(self.num_problems):
            index = (number + seed) % self.num_problems
            yield Problem(f"{self.name}-{index}", self.name, (), "", split)

    def grade(self, problem, text):
        return Grade(1.0, True)


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=4)
WEIGHTS = st.floats(1e-3, 1e3) | st.integers(1, 5).map(float)
MIXTURES = st.lists(st.tuples(st.integers(1, 40), WEIGHTS), min_size=1, max_size=4)


def tasks_of(lengths):
    return [Counted(f"task{number}", length) for number, length in enumerate(lengths)]


def specs_of(mixture):
    return [
        TaskSpec(name=f"{__name__}:Counted", weight=weight, options={"label": f"task{number}", "num_problems": length})
        for number, (length, weight) in enumerate(mixture)
    ]


def longest_epoch(lengths, weights):
    """The most problems of which each task has its share, in exact fractions."""
    exact = [Fraction(weight) for weight in weights]
    bounds = (n / (w / sum(exact)) for n, w in zip(lengths, exact, strict=True))
    return int(min(bounds))


@given(LENGTHS, st.integers(0, 5))
def test_equal_weights_are_round_robin_until_one_task_ends(lengths, seed):
    tasks = tasks_of(lengths)
    rounds = zip(*(task.problems("train", seed) for task in tasks), strict=False)
    round_robin = [problem for together in rounds for problem in together]
    assert list(mixed_problems(tasks, "train", seed)) == round_robin
    assert list(mixed_problems(tasks, "train", seed, [0.1] * len(tasks))) == round_robin


@settings(deadline=None)
@given(MIXTURES, st.integers(0, 5))
def test_each_prefix_of_an_epoch_has_the_shares(mixture, seed):
    lengths, weights = zip(*mixture, strict=True)
    problems = list(mixed_problems(tasks_of(lengths), "train", seed, weights))
    assert len(problems) == longest_epoch(lengths, weights)
    for number, weight in enumerate(map(Fraction, weights)):
        share = weight / sum(map(Fraction, weights))
        num_yielded = 0
        for length, problem in enumerate(problems, start=1):
            num_yielded += problem.task == f"task{number}"
            assert num_yielded < length * share + 1
            assert num_yielded > length * share - len(mixture)


@settings(deadline=None)
@given(MIXTURES, st.integers(0, 5))
def test_an_epoch_has_the_first_problems_of_each_task_in_order(mixture, seed):
    lengths, weights = zip(*mixture, strict=True)
    tasks = tasks_of(lengths)
    problems = list(mixed_problems(tasks, "train", seed, weights))
    for task in tasks:
        own = [problem for problem in problems if problem.task == task.name]
        assert own == list(islice(task.problems("train", seed), len(own)))


@settings(deadline=None)
@given(MIXTURES, st.integers(0, 5), st.integers(0, 60))
def test_the_endless_stream_resumes_from_a_position(mixture, seed, position):
    specs = specs_of(mixture)
    whole = list(islice(endless_problems(specs, "train", seed), position + 20))
    assert list(islice(endless_problems(specs, "train", seed), position, position + 20)) == whole[position:]
    epochs = [epoch for epoch, _ in whole]
    assert epochs == sorted(epochs)
    weights = [spec.weight for spec in specs]
    for epoch in range(max(epochs)):
        of_epoch = [problem for number, problem in whole if number == epoch]
        assert of_epoch == list(mixed_problems(make_tasks(specs), "train", seed + epoch, weights))


def test_weights_three_to_one():
    tasks = tasks_of([9, 9])
    names = [p.problem_id for p in mixed_problems(tasks, "train", 0, [3.0, 1.0])]
    assert names[:8] == ["task0-0", "task0-1", "task1-0", "task0-2", "task0-3", "task0-4", "task1-1", "task0-5"]
    assert len(names) == 12


def test_a_split_without_problems_is_refused():
    with pytest.raises(ValueError, match=r"^tasks: expected .*'heldout'"):
        next(endless_problems(specs_of([(3, 1.0), (0, 1.0)]), "heldout", 0))


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan"), "much"])
def test_weights_are_finite_and_positive(weight):
    with pytest.raises(ValidationError, match="weight"):
        TaskSpec(name="countdown", weight=weight)
