"""What the page is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

Cell = str | tuple[str, float]
"""Text, or text over a bar that fills a share of the cell."""


@dataclass(frozen=True)
class Table:
    """Cells of one table, all of them text."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Panel:
    """One figure."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Section:
    """What stands under one heading."""

    title: str
    text: str
    tables: tuple[Table, ...] = ()
    panels: tuple[Panel, ...] = ()


def known(panels: Iterable[Panel | None]) -> tuple[Panel, ...]:
    """The figures that have something to show."""
    return tuple(panel for panel in panels if panel)
