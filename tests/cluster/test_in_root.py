"""A Dockerfile's instructions as `docker/in_root.py` reads them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCKER = Path(__file__).parents[2] / "docker"
READ = runpy.run_path(str(DOCKER / "in_root.py"))


def test_comments_go_and_continued_lines_are_one() -> None:
    text = "# syntax\nFROM a\n\nRUN b \\\n    # why\n    && c\nENV d=1 \\\n  e=2\n"
    assert READ["instructions"](text) == [("FROM", "a"), ("RUN", "b      && c"), ("ENV", "d=1    e=2")]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_every_instruction_of_our_images_is_known(name: str) -> None:
    found = READ["instructions"]((DOCKER / name).read_text())
    known = {"RUN", "COPY", "ENV", "ARG", "USER", "WORKDIR"} | READ["LEFT_OUT"]
    assert {word for word, _ in found} <= known
    copied = [rest.split()[1:-1] for word, rest in found if word == "COPY"]
    assert all((DOCKER.parent / source).exists() for sources in copied for source in sources)
    assert any("cluster" in sources for sources in copied)
