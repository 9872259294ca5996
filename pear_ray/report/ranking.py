"""Where RL should start: the ranking, pass@k for every k, and before RL against after it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from pear_ray.config import is_after_rl
from pear_ray.report.figures import Line, draw
from pear_ray.report.format import NONE, interval, number, share
from pear_ray.report.load import RunData, as_floats
from pear_ray.report.section import Cell, Panel, Section, Table, known


def choice(measured: RunData) -> Section | str:
    """The ranking of what RL could start from."""
    found = measured.ranking
    if not found:
        return "where RL should start (no rank/ranking.json)"
    numbered = tuple((str(n), text) for n, text in enumerate(found["cautions"], 1))
    cautions = Table(("", "what to bear in mind"), numbered)
    tables = [ranking_table(found), record_table(found), cautions, move_table(measured)]
    return Section(
        "Where should RL start?",
        found["advice"],
        tuple(table for table in tables if table.rows),
        known((*curves(measured), before_against_after(found))),
    )


def ranking_table(found: dict[str, Any]) -> Table:
    """Candidates, the most promising first."""
    k, size = found["k"], found["group_size"]
    header = (
        "rank", "checkpoint", "pass@1", f"pass@{k}", "stays first", "held-out loss", "regime",
        "group signal", f"silent groups of {size}", "entropy", "pass@1 after RL", "foretold",
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for row in found["candidates"]:
        foretold = row.get("predicted_after_rl")
        rows.append(
            (
                NONE if row["rank"] is None else str(row["rank"]),
                row["label"],
                interval(row["pass_at_1"]),
                interval(row["pass_at_k"]),
                share(row["probability_of_first"]),
                number(row["heldout_loss"]),
                row["regime"] or NONE,
                number(row["group_signal"]),
                share(row["share_without_signal"]),
                number(row["entropy"]),
                number(row["after_rl"]),
                f"{number(foretold['value'])} +- {number(foretold['sd'])}" if foretold else NONE,
            )
        )
    return Table(header, tuple(rows), "Candidates; a dash for a rank: dropped")


def record_table(found: dict[str, Any]) -> Table:
    """How well each predictor foretold what is known."""
    rows: list[tuple[Cell, ...]] = []
    for name, of in found["track_record"]["predictors"].items():
        spread = of["heldout_r_squared"]
        halves = f"{number(spread['mean'])} +- {number(spread['sd'])}" if spread else NONE
        rows.append((name, number(of["spearman"]), number(of["r_squared"]), halves))
    header = ("predictor", "Spearman", "R^2", "held-out R^2, half splits")
    caption = f"Track record on {found['track_record']['num_known']} results after RL"
    return Table(header, tuple(rows), caption)


def move_table(measured: RunData) -> Table:
    """How far SFT and RL moved the parameters, all as one vector."""
    keys = ("sft_move", "rl_move", "cosine", "sft_stable_rank_median", "rl_stable_rank_median")
    rows: list[tuple[Cell, ...]] = []
    for home in measured.homes:
        if (of := measured.moves.get(home.name)) is None:
            continue
        cards = [measured.cards.get(label, {}) for label in (f"{home.prefix}sft", home.after_rl)]
        divergences = (interval(card.get("kl_from_start")) for card in cards)
        rows.append((home.name, *(number(of[key]) for key in keys), *divergences))
    header = (
        "arm", "move of SFT", "move of RL", "cosine of the two", "stable rank of SFT, median",
        "of RL", "KL(base || SFT)", "KL(SFT || RL)",
    )  # fmt: skip
    caption = (
        "How far training moved the parameters, |after - before| / |before|, and the policy: KL"
        " divergence over answers to held-out problems, nats per answer"
    )
    return Table(header, tuple(rows), caption)


def curves(measured: RunData) -> Iterable[Panel | None]:
    """pass@k by k, doubling, of the checkpoints before and of those after RL; of several seeds the
    mean, and how far they reach."""
    by_arm: dict[str, list[list[dict[str, float]]]] = {}
    for label, card in measured.cards.items():
        curve = card.get("pass_at_k_curve", [])
        places = [2**power - 1 for power in range(len(curve).bit_length())]
        by_arm.setdefault(without_seed(label), []).append([curve[place] for place in places])
    sides: dict[str, dict[str, Line]] = {"before RL": {}, "after RL": {}}
    longest = 1
    for label, seeds in by_arm.items():
        values = np.array([as_floats(point["value"] for point in points) for points in seeds])
        low, high = values.min(0), values.max(0)
        if len(seeds) == 1:
            low, high = (as_floats(p[key] for p in seeds[0]) for key in ("low", "high"))
        side = "after RL" if is_after_rl(label) else "before RL"
        beside = 0.05 * len(sides[side])
        sides[side][label] = Line(np.arange(len(low)) + beside, values.mean(0), low, high)
        longest = max(longest, len(low))
    ticks = tuple(str(2**power) for power in range(longest))
    for side, lines in sides.items():
        yield draw(f"pass@k {side}", "pass@k", lines, across="k", ticks=ticks)


def before_against_after(found: dict[str, Any]) -> Panel | None:
    """One point for each candidate whose result after RL is known; an arm's seeds look alike."""
    rows = [row for row in found["candidates"] if row["after_rl"] is not None]
    if len(rows) < 2:
        return None
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault(without_seed(row["label"]), []).append(row)
    points = {
        name: Line(
            as_floats(row["pass_at_k"]["value"] for row in seeds),
            as_floats(row["after_rl"] for row in seeds),
        )
        for name, seeds in by_arm.items()
    }
    title = f"pass@{found['k']} before RL, pass@1 after it"
    record = found["track_record"]["predictors"].get(f"pass@{found['k']}")
    if record and record["spearman"] is not None:
        title += f": Spearman {record['spearman']:.2f}"
    across = f"pass@{found['k']} before RL"
    return draw(title, "pass@1 after RL", points, across=across, joined=False)


def without_seed(label: str) -> str:
    """An arm's name in the label of a study's checkpoint: "token@3/rl" is of "token/rl"."""
    return re.sub(r"@\d+", "", label)
