"""Which class stands behind the name of a task: one of this package's, one that an installed
package offers, or any class by the place where it is defined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pear_ray.config import TaskSpec
from pear_ray.errors import ConfigError
from pear_ray.tasks.task import FromFiles, Task

GROUP = "pear_ray.tasks"
FAMILIES = {
    "countdown": "pear_ray.tasks.countdown:Countdown",
    "math": "pear_ray.tasks.math:Math",
    "reasoning_gym": "pear_ray.tasks.reasoning_gym:ReasoningGym",
}


def make_tasks(specs: Sequence[TaskSpec]) -> list[Task]:
    """The tasks of a job, in its order, ready to give problems.

    Raises:
        ConfigError: a name that nothing stands behind; a class that is no task; an option which the
            class does not know; a file which is not there; two tasks of one name, so that nobody
            could tell which of them judges a problem.
    """
    tasks = make_graders(specs)
    for number, (spec, task) in enumerate(zip(specs, tasks, strict=True)):
        if isinstance(task, FromFiles):
            try:
                task.check_files()
            except ValueError as error:
                raise ConfigError(f"tasks.{number}.options: {error}") from error
        same = [before for before in range(number) if tasks[before].name == task.name]
        if same:
            raise ConfigError(
                f"tasks.{number}: read {spec.name!r}, whose problems are called {task.name!r}, as"
                f" those of tasks.{same[0]} are; expected a `label` among its options that tells"
                " the two apart"
            )
    return tasks


def make_graders(specs: Sequence[TaskSpec]) -> list[Task]:
    """The tasks of a job where only their verdicts are wanted: files of problems may be absent.

    Raises:
        ConfigError: as `make_tasks`, files and equal names aside.
    """
    return [_make(f"tasks.{number}", spec) for number, spec in enumerate(specs)]


def _make(where: str, spec: TaskSpec) -> Task:
    family = family_of(where, spec.name)
    try:
        task: Task = family(**spec.options)
    except ImportError as error:
        raise ConfigError(
            f"{where}.name: read {spec.name!r}, which needs a package that cannot be imported:"
            f" {error}; expected it to be installed (pear-ray[tasks] brings those of this"
            " project's own tasks)"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}.options: read {spec.options}; {error}") from error
    name = getattr(task, "name", None)
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{where}.name: read {spec.name!r}, which makes a task whose `name` is {name!r};"
            " expected a text, the `task` of its problems"
        )
    return task


def family_of(where: str, name: str) -> Callable[..., Any]:
    """The class that a task's name stands for. A name of this package's comes before an installed
    package's; `where` begins the messages.

    Raises:
        ConfigError: there is none, there are two, it cannot be loaded, or it is no task.
    """
    found = EntryPoint(name, _value_of(where, name), GROUP)
    try:
        family = found.load()
    except Exception as error:  # of a user's module: any
        raise ConfigError(
            f"{where}.name: read {name!r}, and {found.value} cannot be loaded:"
            f" {type(error).__name__}: {error}; expected a class that can be imported"
        ) from error
    absent = [m for m in ("problems", "grade") if not callable(getattr(family, m, None))]
    if not isinstance(family, type) or absent:
        what = f"without {' and '.join(absent)}" if absent else "not a class"
        raise ConfigError(
            f"{where}.name: read {name!r}, and {found.value} is {what}; expected a class with"
            " problems(split, seed) and grade(problem, text)"
        )
    return family


def _value_of(where: str, name: str) -> str:
    """`package.module:Class` for a name."""
    if name in FAMILIES:
        return FAMILIES[name]
    module, colon, attribute = name.partition(":")
    if colon and all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        return name
    installed = entry_points(group=GROUP)
    values = sorted({entry.value for entry in installed if entry.name == name})
    if len(values) == 1:
        return values[0]
    if values:
        raise ConfigError(
            f"{where}.name: read {name!r}, which {len(values)} installed packages offer:"
            f" {', '.join(values)}; expected one of these in its place"
        )
    known = sorted({*FAMILIES, *(entry.name for entry in installed)})
    raise ConfigError(
        f"{where}.name: read {name!r}; expected one of {', '.join(map(repr, known))}, or"
        " 'package.module:Class'"
    )
