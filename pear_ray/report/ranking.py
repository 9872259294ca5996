"""The ranking of checkpoints for RL, and pass@k for every k."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from markupsafe import Markup

from pear_ray.config import is_after_rl
from pear_ray.report.figures import Line, draw
from pear_ray.report.format import Section, Table
from pear_ray.report.load import RunData, column

CANDIDATE = (
    "rank",
    "label",
    "pass_at_1",
    "pass_at_k",
    "probability_of_first",
    "heldout_loss",
    "regime",
    "group_signal",
    "share_without_signal",
    "entropy",
    "after_rl",
    "predicted_after_rl",
)
MOVE = ("sft_move", "rl_move", "cosine", "sft_stable_rank_median", "rl_stable_rank_median")


def ranking(data: RunData) -> Section | None:
    """The ranking of the checkpoints that RL could start from, and how far training moved them."""
    document = data.ranking
    if not document:
        return None
    record = document["track_record"]
    moves: list[dict[str, Any]] = []
    for arm in data.folders:
        if move := data.moves.get(arm.name):
            sft, rl = (data.cards.get(arm.prefix + s, {}) for s in ("sft", arm.last_stage))
            policy = {"KL(base || SFT)": sft, "KL(SFT || RL)": rl}
            row = {"arm": arm.name} | {key: move[key] for key in MOVE}
            moves.append(row | {key: card.get("kl_from_start") for key, card in policy.items()})
    tables = (
        Table(
            [{key: row.get(key) for key in CANDIDATE} for row in document["candidates"]],
            f"Candidates; rank -: dropped. k = {document['k']}, groups of {document['group_size']}",
        ),
        Table(
            [{"predictor": name, **scores} for name, scores in record["predictors"].items()],
            f"Predictors on the {record['num_known']} candidates with a known result after RL",
        ),
        Table([{"caution": text} for text in document["cautions"]]),
        Table(
            moves,
            "Distance of training: of the parameters |after - before| / |before|, of the policy KL"
            " over answers to held-out problems in nats per answer",
        ),
    )
    title = "Which checkpoint should RL start from?"
    return Section(title, document["advice"], tables, pass_at_k_curves(data))


def pass_at_k_curves(data: RunData) -> Iterator[Markup]:
    """Draw pass@k for k = 1, 2, 4, ... before and after RL; of several seeds mean and range."""
    curves: dict[str, list[list[dict[str, float]]]] = {}
    for label, card in data.cards.items():
        curve = card.get("pass_at_k_curve", [])
        points = [curve[2**power - 1] for power in range(len(curve).bit_length())]
        curves.setdefault(without_seed(label), []).append(points)
    for after in (False, True):
        lines: dict[str, Line] = {}
        for label, seeds in curves.items():
            if is_after_rl(label) == after:
                ends = ("low", "high") if len(seeds) == 1 else ("value", "value")
                value, low, high = (np.array([column(points, key) for points in seeds]) for key in ("value", *ends))
                x = np.arange(value.shape[1]) + 0.05 * len(lines)
                lines[label] = Line(x, value.mean(0), low.min(0), high.max(0))
        ticks = [str(2**power) for power in range(max((len(v.y) for v in lines.values()), default=0))]
        title = f"pass@k {'after' if after else 'before'} RL"
        yield draw(title, "pass@k", lines, x_label="k", ticks=ticks)


def without_seed(label: str) -> str:
    """Return "token/rl" for "token@3/rl", the label of one seed of an arm."""
    return re.sub(r"@\d+", "", label)
