"""Names of tasks: built-in classes, entry points, and any class by its import path."""

from __future__ import annotations

import sys

import pytest

from pear_ray.config import TaskSpec
from pear_ray.errors import ConfigError
from pear_ray.tasks import endless_problems, make_tasks

MODULE = """
from pear_ray.records import Grade, Problem


class Dice:
    def __init__(self, sides=6, label="dice"):
        if sides < 1:
            raise ValueError(f"sides: expected at least 1, got {sides}")
        self.name, self.sides = label, sides

    def problems(self, split, seed):
        for number in range(self.sides):
            yield Problem(f"{self.name}-{number}", self.name, (), str(number), split)

    def grade(self, problem, text):
        return Grade(1.0, True) if text == problem.reference else Grade(0.0, False)


class Nameless(Dice):
    def __init__(self):
        self.name = ""


class NoGrade:
    name = "no-grade"

    def problems(self, split, seed):
        return iter(())


class Nothing:
    pass


class Elsewhere(Dice):
    def __init__(self):
        import a_package_that_nobody_has


def dice():
    return Dice()
"""
ENTRY_POINTS = """[pear_ray.tasks]
their_dice = their_tasks:Dice
their_absent = their_tasks:Absent
twice = their_tasks:Dice
countdown = their_tasks:Nothing
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Two installed packages that offer tasks as entry points."""
    (tmp_path / "their_tasks.py").write_text(MODULE)
    (tmp_path / "their_broken_tasks.py").write_text("raise RuntimeError('broken module')")
    for package, points in {
        "their_tasks": ENTRY_POINTS,
        "other_tasks": "[pear_ray.tasks]\ntwice = other_tasks:Dice\n",
    }.items():
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("their_tasks", None)


def error_of(*specs):
    with pytest.raises(ConfigError) as error:
        make_tasks(specs)
    return str(error.value)


@pytest.mark.parametrize("name", ["their_dice", "their_tasks:Dice"])
def test_a_task_from_another_package(installed, name):
    spec = TaskSpec(name=name, options={"sides": 2, "label": "coins"})
    (task,) = make_tasks([spec])
    assert (task.name, task.sides) == ("coins", 2)
    stream = endless_problems([spec], "train", 0)
    drawn = [next(stream) for _ in range(3)]
    assert [(e, p.problem_id) for e, p in drawn] == [(0, "coins-0"), (0, "coins-1"), (1, "coins-0")]
    assert task.grade(drawn[1][1], "1").correct


def test_built_in_names_come_first(installed):
    (task,) = make_tasks([TaskSpec(name="countdown")])
    assert type(task).__module__ == "pear_ray.tasks.countdown"


KNOWN = "'countdown', 'math', 'reasoning_gym', 'their_absent', 'their_dice', 'twice', or 'package.module:Class'"
METHODS = "expected a class with problems(split, seed) and grade(problem, text)"
IMPORTABLE = "expected a class that can be imported"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("countdwn", f"expected one of {KNOWN}, got 'countdwn'"),
        ("their_tasks:", f"expected one of {KNOWN}, got 'their_tasks:'"),
        ("twice", "expected one of other_tasks:Dice, their_tasks:Dice, got 'twice'"),
        ("their_absent", f"{IMPORTABLE}, got 'their_absent' (their_tasks:Absent: AttributeError: "),
        ("no_such_module:Task", f"{IMPORTABLE}, got 'no_such_module:Task' (no_such_module:Task: M"),
        ("their_broken_tasks:Task", f"{IMPORTABLE}, got 'their_broken_tasks:Task' (their_broken_"),
        ("their_tasks:NoGrade", f"{METHODS}, got their_tasks:NoGrade without grade"),
        ("their_tasks:Nothing", f"{METHODS}, got their_tasks:Nothing without problems and grade"),
        ("their_tasks:dice", f"{METHODS}, got their_tasks:dice without problems and grade"),
        ("their_tasks:Nameless", "expected a task whose `name` is a non-empty string, got ''"),
        ("their_tasks:Elsewhere", "expected the packages that 'their_tasks:Elsewhere' needs"),
    ],
)
def test_names_that_select_no_task_are_refused(installed, name, expected):
    assert error_of(TaskSpec(name=name)).startswith(f"tasks.0.name: {expected}")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sides": 0}, "sides: expected at least 1, got 0"),
        ({"color": 1}, "Dice.__init__() got an unexpected keyword argument 'color'"),
    ],
)
def test_options_that_a_task_rejects_are_refused(installed, options, expected):
    spec = TaskSpec(name="their_dice", options=options)
    assert error_of(spec) == f"tasks.0.options: {expected}"


GYM = {"dataset": "leg_counting"}


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ({"name": "countdown"}, {"name": "countdown", "options": {"max_number": 9}}, "countdown"),
        (
            {"name": "reasoning_gym", "options": GYM},
            {"name": "reasoning_gym", "options": GYM | {"max_animals": 4}},
            "reasoning_gym/leg_counting",
        ),
        ({"name": "their_dice"}, {"name": "their_tasks:Dice"}, "dice"),
    ],
)
def test_tasks_of_one_name_need_labels(installed, first, second, name):
    assert error_of(TaskSpec(**first), TaskSpec(**second)) == (
        f"tasks.1.options.label: expected a task name of its own, got {name!r}, the name of tasks.0"
    )
    second = second | {"options": second.get("options", {}) | {"label": "other"}}
    tasks = make_tasks([TaskSpec(**first), TaskSpec(**second)])
    assert [task.name for task in tasks] == [name, "other"]
    problems = [next(task.problems("train", 0)) for task in tasks]
    assert [problem.task for problem in problems] == [name, "other"]
    assert problems[1].problem_id.startswith("other-")


@pytest.mark.parametrize(
    ("name", "options", "package"),
    [("math", {"path": "a.jsonl"}, "math_verify"), ("reasoning_gym", GYM, "reasoning_gym")],
)
def test_missing_packages_are_named(monkeypatch, name, options, package):
    monkeypatch.setitem(sys.modules, package, None)
    error = error_of(TaskSpec(name=name, options=options))
    assert error.startswith(f"tasks.0.name: expected the packages that {name!r} needs")
    assert package in error and "pear-ray[tasks]" in error
