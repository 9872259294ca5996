"""Sections, tables and figures of the page. Figures are inline SVG in its colors, for day, night and print."""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from pear_ray.report.load import Rows, column, mean

MAX_POINTS = 300
MIN_POINTS_TO_SMOOTH = 20
MAX_LABEL = 40
# A larger legend would hide the lines and goes below the axes.
MAX_LINES_WITH_INNER_LEGEND = 4
# Replaced by the text color of the page.
INK = "#102030"
# Okabe and Ito, distinct for color-blind readers.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 3,
    **{f"{part}.color": INK for part in ("text", "grid", "xtick", "ytick")},
    **{f"axes.{part}color": INK for part in ("label", "edge")},
}


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
    """Tables and figures under a heading of page.html.j2, with text if it depends on the run."""

    tables: Sequence[Table] = ()
    figures: Iterable[Markup] = ()
    text: str = ""


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
            return "-"
    return str(value)


def number(value: float | None, signed: bool = False) -> str:
    """Return "0.391" or "+0.022"; "2.1e-05" if three decimals would show only zeros."""
    if value is None or not math.isfinite(value):
        return "-"
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
    return "-" if math.isnan(last) else f"{number(first)} to {number(last)}"


def clock(seconds: float) -> str:
    """Return "2026-11-05 14:03:11 UTC"."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


@dataclass(frozen=True)
class Line:
    """Points of a line, with the ends of their intervals if they have any."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def by_step(rows: Rows, key: str, reduce: Callable = np.mean) -> Line:
    """Return a metric over the steps, downsampled with `reduce`."""
    return downsample(column(rows, "step"), column(rows, key), reduce)


def downsample(x: np.ndarray, y: np.ndarray, reduce: Callable = np.mean) -> Line:
    """Return the finite points, or one per group of neighbors if there are too many to show."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(y) <= MAX_POINTS:
        return Line(x, y)
    groups = zip(np.array_split(x, MAX_POINTS), np.array_split(y, MAX_POINTS), strict=True)
    points = np.array([(part.mean(), reduce(values)) for part, values in groups])
    return Line(points[:, 0], points[:, 1])


def draw(
    title: str,
    unit: str,
    lines: Mapping[str, Line],
    *,
    x_label: str = "step",
    log: bool = False,
    level: tuple[float, str] | None = None,
    ticks: Sequence[str] = (),
) -> Markup:
    """Return a figure of the lines that have finite points; nothing if there are none. `level` is a horizontal line and
    its label. `ticks` label x = 0, 1, ...; such lines have error bars, others a band between `low` and `high`."""
    lines = {name: line for name, line in lines.items() if np.isfinite(line.y).any()}
    if not lines:
        return Markup()
    # The salt fixes ids from run to run, and keeps those of figures on one page apart.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axes = figure.subplots()
        if log:
            axes.set_yscale("log", nonpositive="mask")
        for place, (name, line) in enumerate(lines.items()):
            style = {
                "color": PALETTE[place % len(PALETTE)],
                "linestyle": DASHES[place % len(DASHES)],
                "label": name if len(name) < MAX_LABEL else f"{name[:MAX_LABEL]}...",
            }
            plot(axes, line, style, error_bars=bool(ticks), smooth=not log)
        if level:
            axes.axhline(level[0], color=INK, linewidth=1, linestyle=":", label=level[1])
        if log:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set_xlim(-0.3, len(ticks) - 0.7)
        axes.set(xlabel=x_label, ylabel=unit)
        if len(lines) > MAX_LINES_WITH_INNER_LEGEND:
            figure.legend(loc="outside lower center", ncols=2 if max(map(len, lines)) < 24 else 1)
        elif len(lines) > 1 or level:
            axes.legend()
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    # matplotlib names groups "axes_1" in every figure; an id may occur once on a page.
    svg = re.sub(r'<g id="[^"]*"', "<g", file.getvalue()).partition("<svg")[2]
    svg = svg.replace(INK, "currentColor").replace(PALETTE[0].lower(), "var(--blue)")
    label = f"{title}, {f'{unit} by {x_label}' if x_label else unit}: {describe(lines, level)}."
    element = '<figure><figcaption>{}</figcaption><svg role="img" aria-label="{}"{}</figure>'
    return Markup(element).format(title, label, Markup(svg))


def plot(axes: Any, line: Line, style: dict[str, Any], *, error_bars: bool, smooth: bool) -> None:
    """Plot a line: with error bars, with a band, or thin below its running mean."""
    if line.low is not None and line.high is not None:
        if error_bars:
            reach = [line.y - line.low, line.high - line.y]
            axes.errorbar(line.x, line.y, yerr=reach, marker="o", capsize=3, **style)
            return
        axes.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.2, linewidth=0)
    elif len(line.y) >= MIN_POINTS_TO_SMOOTH and smooth:
        axes.plot(line.x, line.y, color=style["color"], alpha=0.35, linewidth=0.8)
        line = Line(line.x, running_mean(line.y, len(line.y) // 8))
    marker = "o" if len(line.y) < MIN_POINTS_TO_SMOOTH else None
    axes.plot(line.x, line.y, marker=marker, **style)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean over `width` neighbors, fewer at the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def describe(lines: Mapping[str, Line], level: tuple[float, str] | None) -> str:
    """Return the first and the last value of every line, for the alternative text."""
    texts = [f"{level[1]} at {number(level[0])}"] if level else []
    for name, line in lines.items():
        y = line.y[np.isfinite(line.y)]
        reach = f"from {number(y[0])} to {number(y[-1])}" if len(y) > 1 else f"at {number(y[0])}"
        texts.append(f"{name} {reach}")
    return "; ".join(texts)
