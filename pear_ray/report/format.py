"""Sections and tables of the page, and values as text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from pear_ray.report.load import mean

NONE = "-"


@dataclass(frozen=True)
class Table:
    """Rows that map titles to values; all have the same columns. Without rows it is not shown."""

    rows: Sequence[Mapping[str, Any]]
    caption: str = ""

    @property
    def lines(self) -> list[list[str]]:
        """The titles, then the text of each row."""
        titles = [t.replace("pass_at_", "pass@").replace("_", " ") for t in self.rows[0]]
        return [titles, *([as_text(value) for value in row.values()] for row in self.rows)]

    def markdown(self) -> str:
        """Return the table with aligned columns, readable as plain text."""
        # A line break or a bar would end the cell.
        lines = [[" ".join(t.split()).replace("|", "\\|") for t in line] for line in self.lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        return "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)


@dataclass(frozen=True)
class Section:
    """Text, tables and figures under one heading."""

    title: str
    text: str
    tables: Sequence[Table]
    figures: Iterable[Markup] = ()


def as_text(value: Any) -> str:
    """Return a cell: a number, an interval, "mean ± sd", or text; "-" if unknown."""
    match value:
        case float():
            return number(value)
        case {"low": _}:
            return interval(value)
        case {"sd": sd}:
            return f"{number(value.get('mean', value.get('value')))} ± {number(sd)}"
        case None | "":
            return NONE
    return str(value)


def number(value: float | None, signed: bool = False) -> str:
    """Return "0.391" or "+0.022"; "2.1e-05" if three decimals would show only zeros."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:{'+' * signed}{'.1e' if 0 < abs(value) < 5e-4 else '.3f'}}"


def interval(score: Mapping[str, float], signed: bool = False) -> str:
    """Return "0.391 [0.352, 0.430]". A value that is tiny beside its interval is shown as 0.000."""
    value, low, high = (score[key] for key in ("value", "low", "high"))
    if abs(value) < 5e-4 <= high - low:
        value *= 0.0
    return f"{number(value, signed)} [{number(low, signed)}, {number(high, signed)}]"


def crosses_zero(score: Mapping[str, float]) -> str:
    """Return whether the interval "includes 0" or "excludes 0"."""
    return "includes 0" if score["low"] <= 0 <= score["high"] else "excludes 0"


def ends(values: np.ndarray) -> str:
    """Return "2.028 to 0.682": means over the first and the last tenth, at least one step each."""
    tenth = max(1, len(values) // 10)
    first, last = mean(values[:tenth]), mean(values[-tenth:])
    return NONE if math.isnan(last) else f"{number(first)} to {number(last)}"


def clock(seconds: float) -> str:
    """Return "2026-11-05 14:03:11 UTC"."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
