"""Which class stands behind the name of a task: this package's, an installed one's, one's own."""

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
            raise ValueError(f"sides: read {sides}, expected at least 1")
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
    """Two packages that offer tasks, as an installer leaves them."""
    (tmp_path / "their_tasks.py").write_text(MODULE)
    (tmp_path / "their_broken_tasks.py").write_text("raise RuntimeError('out of order')")
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


def refusal_of(*specs):
    with pytest.raises(ConfigError) as refusal:
        make_tasks(specs)
    return str(refusal.value)


@pytest.mark.parametrize("name", ["their_dice", "their_tasks:Dice"])
def test_a_task_of_ones_own(installed, name):
    spec = TaskSpec(name=name, options={"sides": 2, "label": "coins"})
    (task,) = make_tasks([spec])
    assert (task.name, task.sides) == ("coins", 2)
    stream = endless_problems([spec], "train", 0)
    drawn = [next(stream) for _ in range(3)]
    assert [(e, p.problem_id) for e, p in drawn] == [(0, "coins-0"), (0, "coins-1"), (1, "coins-0")]
    assert task.grade(drawn[1][1], "1").correct


def test_a_name_of_this_package_comes_first(installed):
    (task,) = make_tasks([TaskSpec(name="countdown")])
    assert type(task).__module__ == "pear_ray.tasks.countdown"


WANTED = "expected a class with problems(split, seed) and grade(problem, text)"
LOADABLE = "expected a class that can be imported"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"name": "countdwn"},
            "tasks.0.name: read 'countdwn'; expected one of 'countdown', 'math', 'reasoning_gym',"
            " 'their_absent', 'their_dice', 'twice', or 'package.module:Class'",
        ),
        (
            {"name": "their_tasks:"},
            "tasks.0.name: read 'their_tasks:'; expected one of 'countdown', 'math',"
            " 'reasoning_gym', 'their_absent', 'their_dice', 'twice', or 'package.module:Class'",
        ),
        (
            {"name": "twice"},
            "tasks.0.name: read 'twice', which 2 installed packages offer: other_tasks:Dice,"
            " their_tasks:Dice; expected one of these in its place",
        ),
        (
            {"name": "their_absent"},
            "tasks.0.name: read 'their_absent', and their_tasks:Absent cannot be loaded:"
            f" AttributeError: module 'their_tasks' has no attribute 'Absent'; {LOADABLE}",
        ),
        (
            {"name": "no_such_module:Task"},
            "tasks.0.name: read 'no_such_module:Task', and no_such_module:Task cannot be loaded:"
            f" ModuleNotFoundError: No module named 'no_such_module'; {LOADABLE}",
        ),
        (
            {"name": "their_broken_tasks:Task"},
            "tasks.0.name: read 'their_broken_tasks:Task', and their_broken_tasks:Task cannot be"
            f" loaded: RuntimeError: out of order; {LOADABLE}",
        ),
        (
            {"name": "their_tasks:NoGrade"},
            "tasks.0.name: read 'their_tasks:NoGrade', and their_tasks:NoGrade is without"
            f" grade; {WANTED}",
        ),
        (
            {"name": "their_tasks:Nothing"},
            "tasks.0.name: read 'their_tasks:Nothing', and their_tasks:Nothing is without problems"
            f" and grade; {WANTED}",
        ),
        (
            {"name": "their_tasks:dice"},
            "tasks.0.name: read 'their_tasks:dice', and their_tasks:dice is without problems and"
            f" grade; {WANTED}",
        ),
        (
            {"name": "their_tasks:Nameless"},
            "tasks.0.name: read 'their_tasks:Nameless', which makes a task whose `name` is '';"
            " expected a text, the `task` of its problems",
        ),
        (
            {"name": "their_tasks:Elsewhere"},
            "tasks.0.name: read 'their_tasks:Elsewhere', which needs a package that cannot be"
            " imported: No module named 'a_package_that_nobody_has'; expected it to be installed"
            " (pear-ray[tasks] brings those of this project's own tasks)",
        ),
        (
            {"name": "their_dice", "options": {"sides": 0}},
            "tasks.0.options: read {'sides': 0}; sides: read 0, expected at least 1",
        ),
        (
            {"name": "their_dice", "options": {"color": 1}},
            "tasks.0.options: read {'color': 1}; Dice.__init__() got an unexpected keyword"
            " argument 'color'",
        ),
    ],
)
def test_what_is_no_task_is_refused(installed, spec, message):
    assert refusal_of(TaskSpec(**spec)) == message


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
def test_two_tasks_of_one_name_are_refused_and_labels_tell_them_apart(
    installed, first, second, name
):
    assert refusal_of(TaskSpec(**first), TaskSpec(**second)) == (
        f"tasks.1: read {second['name']!r}, whose problems are called {name!r}, as those of tasks.0"
        " are; expected a `label` among its options that tells the two apart"
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
def test_a_package_that_is_not_installed_is_named(monkeypatch, name, options, package):
    monkeypatch.setitem(sys.modules, package, None)
    said = refusal_of(TaskSpec(name=name, options=options))
    assert said.startswith(f"tasks.0.name: read {name!r}, which needs a package that cannot be")
    assert package in said and "pear-ray[tasks]" in said
