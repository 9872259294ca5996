"""One page, one table and one spreadsheet of everything a run measured.

Reads the files of the run folder and nothing else, and needs no Ray. What the run has not
measured is left out and named.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from pear_ray.config import TRAINING_STAGES, Job
from pear_ray.report.diagnostics import agreement, happened, scores, spent, weights
from pear_ray.report.format import as_markdown, clock, interval, number
from pear_ray.report.load import RunData, read
from pear_ray.report.ranking import choice
from pear_ray.report.results import (
    NOISE,
    NOISE_FLOOR,
    answers,
    change,
    checkpoint_pairs,
    differences,
    learning,
    results,
    training_table,
)
from pear_ray.report.section import Cell, Section, Table
from pear_ray.report.study import study, study_caution, study_conclusion
from pear_ray.run import RunDir

WIDTH = 100
SECTIONS: tuple[Callable[[RunData], Section | str], ...] = (
    results,
    differences,
    choice,
    learning,
    weights,
    answers,
    scores,
    agreement,
    spent,
    happened,
)
"""In the order of the page. One that has nothing to show says what is missing."""


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Write index.html, report.md and report.csv into RUN/report."""
    measured = read(run.folder)
    first = (study,) if measured.study else ()
    found = [section(measured) for section in (*first, *SECTIONS)]
    sections = [section for section in found if isinstance(section, Section)]
    absent = [missing for missing in found if isinstance(missing, str)]
    with run.new_folder("report") as folder:
        (folder / "index.html").write_text(page(measured, sections, absent))
        (folder / "report.md").write_text(markdown(measured, absent))
        (folder / "report.csv").write_text(spreadsheet(measured))
    return {"page": str(run.folder / "report" / "index.html")}


def page(measured: RunData, sections: list[Section], absent: list[str]) -> str:
    """The page: it holds all that it shows, and asks nothing of the network."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text())
    return template.render(
        name=measured.own.name,
        conclusion=conclusion(measured),
        caution=caution(measured),
        absent=absent,
        sections=sections,
        command=measured.own.manifest.get("command"),
        versions=measured.own.manifest.get("versions", {}),
        job=json.dumps(measured.job, indent=2) if measured.job else "",
        written=clock(time.time()),
    )


def conclusion(measured: RunData) -> str:
    """The result in a sentence that says no more than the numbers."""
    if measured.study:
        return study_conclusion(measured)
    if not measured.cards:
        trained = [arm.name for arm in measured.arms if arm.last]
        done = f"RL has run in {', '.join(trained)}, but no" if trained else "No"
        return f"{done} checkpoint has been evaluated: there is no result yet."
    k = measured.ks[0]
    scores = [(arm, measured.score(arm.after_rl, k)) for arm in measured.arms]
    reached = sorted(((s["value"], arm) for arm, s in scores if s), key=lambda pair: -pair[0])
    if not reached:
        return f"Nothing has been evaluated after RL: pass@{k} is known before it only."
    if len(reached) == 1:
        value, arm = reached[0]
        before = measured.score(measured.before_rl(arm), k)
        compared = f" and {number(before['value'])} before it" if before else ""
        return f"{arm.name} has pass@{k} {number(value)} after RL{compared}."
    (best, first), (next_best, second) = reached[:2]
    relation = "is ahead of" if best > next_best else "is level with"
    text = (
        f"After RL {first.name} {relation} {second.name}, pass@{k} {number(best)} against"
        f" {number(next_best)}"
    )
    paired = measured.difference(first.after_rl, second.after_rl, k)
    if paired is None:
        return f"{text}; their difference has no interval."
    among = f", the best two of {len(reached)} arms" if len(reached) > 2 else ""
    crosses = "includes" if paired["low"] <= 0 <= paired["high"] else "excludes"
    side = "below" if abs(paired["value"]) < NOISE_FLOOR else "not below"
    return (
        f"{text}{among}. The paired difference is {interval(paired, signed=True)} over"
        f" {measured.scorecard['num_problems']} problems: its 95 % interval {crosses} 0, and it is"
        f" {side} the noise floor of {number(NOISE_FLOOR)}."
    )


def caution(measured: RunData) -> str:
    """What one seed cannot show."""
    if measured.study:
        return study_caution(measured)
    return (
        f"This is one seed ({measured.job.get('run', {}).get('seed', 'not noted')}), and one seed"
        " proves nothing: in miniature studies two nearly equal checkpoints ended about"
        f" {number(NOISE)} apart after RL, so a single-seed difference below {number(NOISE_FLOOR)}"
        " means nothing. Intervals cover the choice of problems, not the luck of training."
    )


def markdown(measured: RunData, absent: list[str]) -> str:
    """The tables for a terminal or a pull request, the table of arms first."""
    tables = list(study(measured).tables) if measured.study else []
    if measured.cards and not tables:
        tables = [arms_by_k(measured)]
    told = [textwrap.fill(text, WIDTH) for text in (conclusion(measured), caution(measured))]
    if absent:
        told.append(textwrap.fill(f"Not in this run: {'; '.join(absent)}.", WIDTH))
    against = differences(measured) if not measured.study else ""
    more = list(against.tables) if isinstance(against, Section) else []
    if any(arm.rows for arm in measured.arms):
        more.append(training_table(measured))
    if not tables and more:
        tables, more = more[-1:], more[:-1]
    return "\n".join(
        as_markdown(t) if isinstance(t, Table) else f"{t}\n" for t in tables + told + more
    )


def arms_by_k(measured: RunData) -> Table:
    """The table of arms, narrow enough for a terminal."""
    rows: list[tuple[Cell, ...]] = []
    for k in measured.ks:
        for name, _, before, after in checkpoint_pairs(measured):
            scores = interval(measured.score(before, k)), interval(measured.score(after, k))
            rows.append((name, f"pass@{k}", *scores, change(measured, before, after, k)))
    return Table(
        ("arm", "of", "before RL [95 %]", "after RL [95 %]", "change through RL"), tuple(rows)
    )


def spreadsheet(measured: RunData) -> str:
    """One row per checkpoint, evaluated or only trained; a cell is empty where nothing is known."""
    of_arms = {f"{a.prefix}{s}": (a, s) for a in measured.arms for s in TRAINING_STAGES if a.of(s)}
    rows = []
    for label in dict.fromkeys([*measured.cards, *of_arms]):
        card = measured.cards.get(label, {})
        row: dict[str, Any] = {"checkpoint": label}
        if label in of_arms:
            arm, stage = of_arms[label]
            row |= {"arm": arm.name, "stage": stage, "steps": len(arm.of(stage))}
            row["seconds"] = arm.manifest.get("stages", {}).get(stage, {}).get("seconds")
        for k, score in card.get("pass_at_k", {}).items():
            row |= {f"pass_at_{k}": score["value"]}
            row |= {f"pass_at_{k}_{end}": score[end] for end in ("low", "high")}
        row |= {
            k: v
            for k, v in card.items()
            if k not in ("path", "pass_at_k", "pass_at_k_curve", "parts", "kl_from_start")
        }
        if divergence := card.get("kl_from_start"):
            row["kl_from_start"] = divergence["value"]
        rows.append(row | card.get("parts", {}))
    header = dict.fromkeys(["checkpoint", "arm", "stage", "steps", "seconds"])
    header |= dict.fromkeys(key for row in rows for key in row)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(header), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
