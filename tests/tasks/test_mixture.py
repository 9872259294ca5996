"""Several tasks as one stream: shares, order, epochs, and what a place in it stands for."""

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
    """`num_problems` problems, 0 and onwards, in one order for each seed."""

    def __init__(self, label: str, num_problems: int) -> None:
        self.name = label
        self.num_problems = num_problems

    def problems(self, split, seed):
        for number in range(self.num_problems):
            turned = (number + seed) % self.num_problems
            yield Problem(f"{self.name}-{turned}", self.name, (), "", split)

    def grade(self, problem, text):
        return Grade(1.0, True)


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=4)
WEIGHTS = st.floats(1e-3, 1e3) | st.integers(1, 5).map(float)
MIXTURES = st.lists(st.tuples(st.integers(1, 40), WEIGHTS), min_size=1, max_size=4)


def tasks_of(lengths):
    return [Counted(f"task{number}", length) for number, length in enumerate(lengths)]


def specs_of(mixture):
    return [
        TaskSpec(
            name=f"{__name__}:Counted",
            weight=weight,
            options={"label": f"task{number}", "num_problems": length},
        )
        for number, (length, weight) in enumerate(mixture)
    ]


def longest_epoch(lengths, weights):
    """The most problems of which every task has its share, with fractions."""
    exact = [Fraction(weight) for weight in weights]
    bounds = (n / (w / sum(exact)) for n, w in zip(lengths, exact, strict=True))
    return int(min(bounds))


@given(LENGTHS, st.integers(0, 5))
def test_tasks_of_equal_weight_come_in_turn_until_one_has_no_more(lengths, seed):
    tasks = tasks_of(lengths)
    rounds = zip(*(task.problems("train", seed) for task in tasks), strict=False)
    in_turn = [problem for together in rounds for problem in together]
    assert list(mixed_problems(tasks, "train", seed)) == in_turn
    assert list(mixed_problems(tasks, "train", seed, [0.1] * len(tasks))) == in_turn


@settings(deadline=None)
@given(MIXTURES, st.integers(0, 5))
def test_every_start_of_an_epoch_has_the_shares(mixture, seed):
    lengths, weights = zip(*mixture, strict=True)
    problems = list(mixed_problems(tasks_of(lengths), "train", seed, weights))
    assert len(problems) == longest_epoch(lengths, weights)
    for number, weight in enumerate(map(Fraction, weights)):
        share = weight / sum(map(Fraction, weights))
        given_so_far = 0
        for length, problem in enumerate(problems, start=1):
            given_so_far += problem.task == f"task{number}"
            assert given_so_far < length * share + 1
            assert given_so_far > length * share - len(mixture)


@settings(deadline=None)
@given(MIXTURES, st.integers(0, 5))
def test_no_problem_comes_twice_in_an_epoch_and_none_is_left_out_of_a_task(mixture, seed):
    lengths, weights = zip(*mixture, strict=True)
    tasks = tasks_of(lengths)
    problems = list(mixed_problems(tasks, "train", seed, weights))
    for task in tasks:
        own = [problem for problem in problems if problem.task == task.name]
        assert own == list(islice(task.problems("train", seed), len(own)))


@settings(deadline=None)
@given(MIXTURES, st.integers(0, 5), st.integers(0, 60))
def test_a_place_in_the_endless_stream_is_enough_to_go_on_from(mixture, seed, place):
    specs = specs_of(mixture)
    whole = list(islice(endless_problems(specs, "train", seed), place + 20))
    assert list(islice(endless_problems(specs, "train", seed), place, place + 20)) == whole[place:]
    epochs = [epoch for epoch, _ in whole]
    assert epochs == sorted(epochs)
    weights = [spec.weight for spec in specs]
    for epoch in range(max(epochs)):
        of_epoch = [problem for number, problem in whole if number == epoch]
        assert of_epoch == list(mixed_problems(make_tasks(specs), "train", seed + epoch, weights))


def test_three_to_one():
    tasks = tasks_of([9, 9])
    names = [p.problem_id for p in mixed_problems(tasks, "train", 0, [3.0, 1.0])]
    assert names[:8] == [
        "task0-0",
        "task0-1",
        "task1-0",
        "task0-2",
        "task0-3",
        "task0-4",
        "task1-1",
        "task0-5",
    ]
    assert len(names) == 12


def test_a_split_without_problems_ends_the_stream():
    with pytest.raises(ValueError, match=r"^tasks: no problem of split 'heldout'; expected at"):
        next(endless_problems(specs_of([(3, 1.0), (0, 1.0)]), "heldout", 0))


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan"), "much"])
def test_a_weight_is_a_number_above_zero(weight):
    with pytest.raises(ValidationError, match="weight"):
        TaskSpec(name="countdown", weight=weight)
