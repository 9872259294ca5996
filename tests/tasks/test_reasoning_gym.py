"""reasoning-gym datasets as tasks."""

from __future__ import annotations

from ast import literal_eval
from itertools import islice

import pytest

from pear_ray.config import TaskSpec
from pear_ray.errors import ConfigError
from pear_ray.tasks import make_tasks
from pear_ray.tasks.reasoning_gym import ReasoningGym


def reference_answer(problem):
    """The dataset's own answer in the tags that it expects."""
    return f"<answer>{literal_eval(problem.reference)['answer']}</answer>"


@pytest.mark.parametrize("dataset", ["leg_counting", "countdown", "knights_knaves", "rearc"])
def test_the_reference_answer_is_correct(dataset):
    task = ReasoningGym(dataset)
    for problem in islice(task.problems("train", seed=3), 3):
        grade = task.grade(problem, f"I think. {reference_answer(problem)}")
        assert (grade.reward, grade.correct, grade.note) == (1.0, True, "")


def test_wrong_answers_are_not_correct():
    task = ReasoningGym("leg_counting")
    problem = next(task.problems("train", seed=0))
    assert task.grade(problem, "4").note == "no <answer> tags"
    assert task.grade(problem, "<answer>-1</answer>").correct is False


def test_problems_are_distinct_and_in_one_split():
    task = ReasoningGym("leg_counting", heldout_fraction=0.3)
    splits = [list(islice(task.problems(split, 1), 60)) for split in ("train", "heldout")]
    ids = [problem.problem_id for problems in splits for problem in problems]
    assert len(set(ids)) == 120
    assert list(islice(task.problems("train", 1), 60)) == splits[0]
    assert list(islice(task.problems("train", 2), 60)) != splits[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ReasoningGym.__init__() missing 1 required positional argument: 'dataset'"),
        ({"dataset": "no_such"}, "Dataset 'no_such' not registered"),
        (
            {"dataset": "leg_counting", "heldout_fraction": 1.0},
            "heldout_fraction: expected a number in (0, 1), got 1.0",
        ),
        (
            {"dataset": "leg_counting", "min_animals": 0},
            "parameters of dataset 'leg_counting': min_animals must be positive",
        ),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigError) as refusal:
        make_tasks([TaskSpec(name="reasoning_gym", options=options)])
    assert str(refusal.value) == f"tasks.0.options: {message}"
