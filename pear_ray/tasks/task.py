"""What a task is: problems to answer, and a verdict on each answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from pear_ray.records import Grade, Problem


class Task(Protocol):
    """A family of problems with verifiable answers.

    A job makes it from the options of its `[[tasks]]` entry, as keyword arguments, in each process
    that uses it. One of your own needs no change here: name it `package.module:Class` in the job,
    or offer it as an entry point of the group `pear_ray.tasks`.
    """

    name: str
    """The `task` of its problems: by it the judge of an answer is found."""

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Distinct problems of `split` ("train" or "heldout"), in an order fixed by `seed`."""

    def grade(self, problem: Problem, text: str) -> Grade:
        """Judge an answer. Never raises, whatever the text."""


@runtime_checkable
class Demonstrator(Protocol):
    """A task that can also write answers itself, so that a network can be made from nothing."""

    def vocabulary(self) -> list[str]:
        """Every word that a prompt or an answer can hold."""

    def demonstrations(
        self, styles: Mapping[str, float], solved_fraction: float, seed: int
    ) -> Iterator[tuple[Problem, str]]:
        """Endless (problem of split "train", answer) pairs; `styles` maps a style to its weight."""


@runtime_checkable
class FromFiles(Protocol):
    """A task that reads its problems from files. They are looked for when a job is read, and not
    where only verdicts are wanted."""

    def check_files(self) -> None:
        """Look for the files, without reading them.

        Raises:
            ValueError: they are not there, or not of a kind that can be read.
        """
