"""Arms over seeds: what was expected, what came out, and what it cost."""

from __future__ import annotations

from typing import Any

from pear_ray.report.format import interval, number
from pear_ray.report.load import RunData
from pear_ray.report.section import Cell, Section, Table

WHEN = ("before RL", "after RL")


def study(measured: RunData) -> Section:
    """The table of arms, means over seeds, and their differences seed by seed."""
    found = measured.study
    plan = found["plan"]
    text = (
        f"Means over {len(found['seeds'])} seeds; in brackets Student's 95 % interval over seeds."
        f" Primary measure, fixed beforehand: {plan['primary']}, against {found['baseline']}."
    )
    if plan["hypothesis"]:
        text += f" Expected beforehand: {plan['hypothesis']}"
    spearman = found["spearman_before_and_after"]
    if spearman is not None:
        text += f" The arms' order before RL and after it: Spearman {spearman:.2f}."
    for pair in found["reversals"]:
        text += (
            f" {pair['better_before']} was ahead of {pair['better_after']} before RL and is behind"
            " it after."
        )
    return Section("The study", text, (arm_table(found), difference_table(found)))


def arm_table(found: dict[str, Any]) -> Table:
    """One row for each arm."""
    measures = list(next(iter(found["arms"].values()))[WHEN[0]])
    header = ["arm", *(f"{of} {when}" for of in measures for when in WHEN)]
    rows: list[tuple[Cell, ...]] = []
    for name, arm in found["arms"].items():
        scores = [interval(arm[when][of]) for of in measures for when in WHEN]
        seconds = [number(seconds, digits=0) for seconds in arm["seconds"].values()]
        rows.append((name, *scores, *seconds))
    return Table((*header, "SFT, s", "RL, s"), tuple(rows), "Arms, means over seeds")


def difference_table(found: dict[str, Any]) -> Table:
    """Each arm minus the one it is compared with."""
    rows: list[tuple[Cell, ...]] = []
    for row in found["differences"]:
        seeds = ", ".join(number(value, signed=True) for value in row["by_seed"])
        pair = f"{row['arm']} - {row['baseline']}"
        rows.append((pair, f"{row['of']} {row['when']}", interval(row, signed=True), seeds))
    header = ("pair", "of", "difference [95 %]", "seed by seed")
    return Table(header, tuple(rows), "Differences, paired over seeds")


def study_conclusion(measured: RunData) -> str:
    """The primary result in a sentence."""
    told = []
    for row in measured.study["primary"]:
        crosses = "includes" if row["low"] <= 0 <= row["high"] else "excludes"
        told.append(
            f"{row['arm']} - {row['baseline']} {interval(row, signed=True)} (interval {crosses} 0)"
        )
    num_seeds = len(measured.study["seeds"])
    return (
        f"After RL, {measured.study['primary'][0]['of']} over {num_seeds} seeds: {'; '.join(told)}."
    )


def study_caution(measured: RunData) -> str:
    """What the intervals cover."""
    return (
        f"Intervals are Student's over {len(measured.study['seeds'])} seeds and are not corrected"
        " for the number of comparisons. All seeds share one base, one corpus and one set of"
        " problems: what another of these would change is not covered."
    )
