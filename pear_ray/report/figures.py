"""Figures as SVG which takes its ink from the page: readable by day, by night and in print."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pear_ray.report.format import number
from pear_ray.report.load import as_floats
from pear_ray.report.section import Panel

MAX_POINTS = 300
MIN_POINTS_TO_SMOOTH = 20
MAX_NAME = 40
MAX_LINES_INSIDE = 4
"""With more, the legend would hide them and stands below."""
INK = "#102030"
"""Stands for the text color of the page until the SVG is written."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colors that color-blind people can tell apart (Okabe and Ito)."""
DASHES = ("-", "--", "-.", ":")
INKED = (
    "text.color",
    "axes.labelcolor",
    "axes.edgecolor",
    "xtick.color",
    "ytick.color",
    "grid.color",
)
DRAWING = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    **dict.fromkeys(INKED, INK),
}


@dataclass(frozen=True)
class Line:
    """Points of a figure, with the ends of their intervals where there are any."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def by_step(rows: Sequence[Mapping[str, Any]], key: str, pick: Callable = np.mean) -> Line:
    """One number of a stage over its steps; many steps are gathered, `pick` says how."""
    return gathered(
        as_floats(row["step"] for row in rows), as_floats(row.get(key) for row in rows), pick
    )


def gathered(x: np.ndarray, y: np.ndarray, pick: Callable = np.mean) -> Line:
    """The known points, or as many groups of neighbors as a figure can show."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(y) <= MAX_POINTS:
        return Line(x, y)
    groups = [np.array_split(values, MAX_POINTS) for values in (x, y)]
    return Line(
        np.array([group.mean() for group in groups[0]]), np.array([pick(g) for g in groups[1]])
    )


def draw(
    title: str,
    unit: str,
    lines: Mapping[str, Line],
    *,
    across: str = "step",
    log: bool = False,
    level: tuple[float, str] | None = None,
    ticks: tuple[str, ...] = (),
    joined: bool = True,
) -> Panel | None:
    """A figure of all lines that have points; None if none has. `ticks` name the places 0, 1, ...
    of lines whose points are few and have intervals. Points that are not `joined` stand alone."""
    lines = {name: line for name, line in lines.items() if np.isfinite(line.y).any()}
    if not lines:
        return None
    # The salt makes ids that are the same every time and differ between the figures of a page.
    with matplotlib.rc_context({**DRAWING, "svg.hashsalt": title}):
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axes = figure.subplots()
        if log:
            axes.set_yscale("log", nonpositive="mask")
        for place, (name, line) in enumerate(lines.items()):
            dash = DASHES[place % 4] if joined else "none"
            style = {"color": PALETTE[place % 6], "linestyle": dash}
            style["label"] = name if len(name) < MAX_NAME else name[:MAX_NAME] + "..."
            trace(axes, line, style, bool(ticks), log)
        if level:
            axes.axhline(level[0], color=INK, linewidth=1, linestyle=":", label=level[1])
        if log:
            label_powers(axes)
        else:
            axes.set_ylim(bottom=0)
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set_xlim(-0.3, len(ticks) - 0.7)
        axes.set_xlabel(across)
        axes.set_ylabel(unit)
        if len(lines) > MAX_LINES_INSIDE:
            columns = 2 if max(map(len, lines)) < 24 else 1
            figure.legend(loc="outside lower center", ncols=columns)
        elif len(lines) > 1 or level:
            axes.legend()
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Panel(title, inline(file.getvalue(), describe(title, unit, across, lines, level)))


def label_powers(axes: Any) -> None:
    """Plain numbers on a logarithmic axis, three in a decade where there are few decades."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x:g}" if x >= 1e-3 else f"{x:.0e}")
    )
    axes.yaxis.set_minor_formatter(NullFormatter())


def trace(axes: Any, line: Line, style: dict[str, Any], apart: bool, log: bool) -> None:
    """One line: with error bars where points are few, else with a band or its running mean."""
    if apart and line.low is not None and line.high is not None:
        reach = [line.y - line.low, line.high - line.y]
        axes.errorbar(line.x, line.y, yerr=reach, marker="o", capsize=3, **style)
        return
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.2, linewidth=0)
    elif len(line.y) >= MIN_POINTS_TO_SMOOTH and not log and style["linestyle"] != "none":
        axes.plot(line.x, line.y, color=style["color"], alpha=0.35, linewidth=0.8)
        line = Line(line.x, running_mean(line.y, len(line.y) // 8))
    is_marked = len(line.y) < MIN_POINTS_TO_SMOOTH or style["linestyle"] == "none"
    marker = "o" if is_marked else None
    axes.plot(line.x, line.y, marker=marker, markersize=3, **style)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over `width` neighbors, fewer at the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def describe(
    title: str,
    unit: str,
    across: str,
    lines: Mapping[str, Line],
    level: tuple[float, str] | None,
) -> str:
    """The figure in words, for those who do not see it."""
    told = []
    for name, line in lines.items():
        known = np.isfinite(line.y)
        first, last, x = line.y[known][0], line.y[known][-1], line.x[known][0]
        alone = f"{number(first)} at {x:g}" if across else number(first)
        along = f"from {number(first)} to {number(last)}"
        told.append(f"{name} {along if known.sum() > 1 else alone}")
    told += [f"{level[1]} at {number(level[0])}"] if level else []
    over = f" by {across}" if across else ""
    return f"{title}, {unit}{over}: {'; '.join(told)}."


def inline(document: str, description: str) -> Markup:
    """An SVG file as an element of the page, which chooses its ink, its blue and its size."""
    svg = document[document.index("<svg") :].replace(INK, "currentColor")
    svg = svg.replace(PALETTE[0].lower(), "var(--blue)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[\d.]+pt"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[\d.]+pt"', r"\1", svg)
    label = f'<svg role="img" aria-label="{escape(description)}"'
    return Markup(svg.replace("<svg", label, 1))
