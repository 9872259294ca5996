"""Numbers as words: three decimals, and a dash for what is not known. Tables as text."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import numpy as np

from pear_ray.report.section import Cell, Table

NONE = "-"


def number(value: float | None, signed: bool = False, digits: int = 3) -> str:
    """0.391, +0.022; what three decimals would hide is written 2.1e-05."""
    if value is None or not math.isfinite(value):
        return NONE
    sign = "+" if signed else ""
    if 0 < abs(value) < 0.5 * 10**-digits:
        return f"{value:{sign}.1e}"
    return f"{value:{sign}.{digits}f}"


def share(value: float | None, whole: float = 1.0) -> Cell:
    """A number with a bar."""
    if value is None or not math.isfinite(value) or not whole > 0:
        return number(value)
    return number(value), min(1.0, max(0.0, value / whole))


def interval(score: Mapping[str, float] | None, signed: bool = False) -> str:
    """0.391 [0.352, 0.430]; between such bounds 2.1e-05 is 0.000."""
    if score is None:
        return NONE
    value, low, high = (score[part] for part in ("value", "low", "high"))
    if value and abs(value) < 5e-4 <= high - low:
        value = 0.0 * value
    return f"{number(value, signed)} [{number(low, signed)}, {number(high, signed)}]"


def from_to(values: np.ndarray) -> str:
    """Means over the first and the last tenth of the steps."""
    first, last = ends(values)
    return NONE if math.isnan(last) else f"{number(first)} to {number(last)}"


def ends(values: np.ndarray) -> tuple[float, float]:
    """Means over the first and the last tenth, at least one step each."""
    tenth = max(1, len(values) // 10)
    return mean(values[:tenth]), mean(values[-tenth:])


def mean(values: np.ndarray) -> float:
    """Mean of the values that are known."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def largest(values: np.ndarray) -> float:
    """Largest of the values that are known."""
    known = values[np.isfinite(values)]
    return float(known.max()) if len(known) else math.nan


def clock(seconds: float) -> str:
    """2026-11-05 14:03:11 UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def as_markdown(table: Table) -> str:
    """The table with its columns aligned, so that it also reads as plain text."""
    texts = [[plain(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(len(row[place]) for row in texts) for place in range(len(table.header))]
    texts.insert(1, ["-" * width for width in widths])
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in texts
    ]
    return "\n".join(lines) + "\n"


def plain(cell: Cell) -> str:
    """A cell as one line that cannot end the cell."""
    text = cell if isinstance(cell, str) else cell[0]
    return " ".join(text.split()).replace("|", "\\|")
