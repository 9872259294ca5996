"""What came out: pass@k of the arms, their differences, how they learned, what they answer."""

from __future__ import annotations

from typing import Any

import numpy as np

from pear_ray.config import is_after_rl
from pear_ray.report.figures import Line, by_step, draw
from pear_ray.report.format import NONE, from_to, interval, number, share
from pear_ray.report.load import Rows, RunData, as_floats
from pear_ray.report.section import Cell, Panel, Section, Table, known
from pear_ray.report.study import WHEN

NOISE = 0.02
"""pass@1 between two nearly equal checkpoints after RL, as seen over seeds."""
NOISE_FLOOR = 0.04
"""Below it, a difference from one seed means nothing."""


MOST_BESIDE_EACH_OTHER, PROBLEMS_SHOWN, LONGEST_SHOWN = 8, 3, 600
"""Checkpoints, problems, and characters of an answer."""


def results(measured: RunData) -> Section | str:
    """The table of arms."""
    card = measured.scorecard
    if not card:
        return "pass@k of the checkpoints (no evaluate/scorecard.json)"
    header = ["arm"]
    for k in measured.ks:
        header += [f"pass@{k} before RL", f"pass@{k} after RL", "change"]
    rows: list[tuple[Cell, ...]] = []
    for name, settings, before, after in checkpoint_pairs(measured):
        cells: list[Cell] = [name]
        for k in measured.ks:
            cells.append(interval(measured.score(before, k)))
            cells.append(interval(measured.score(after, k)))
            cells.append(change(measured, before, after, k))
        rows.append((*cells, settings))
    return Section(
        "Arms",
        f"pass@k on {card['num_problems']} held-out problems, {card['samples_per_problem']} answers"
        f" to each at temperature {card['temperature']}, seed {card['seed']}; in brackets the 95 %"
        " interval over problems. Before RL is after SFT; a model that is no arm, such as the base"
        " from which all start, is shown as it is.",
        (Table((*header, "sets"), tuple(rows)),),
        known(before_and_after(measured, k) for k in measured.ks),
    )


def checkpoint_pairs(measured: RunData) -> list[tuple[str, str, str, str]]:
    """Name, settings, and the labels of the checkpoints before and after RL."""
    own = {label for arm in measured.arms for label in (f"{arm.prefix}sft", arm.after_rl)}
    others = [(label, NONE, label, "") for label in measured.cards if label not in own]
    return others + [
        (arm.name, arm.settings or NONE, measured.before_rl(arm), arm.after_rl)
        for arm in measured.arms
    ]


def change(measured: RunData, before: str, after: str, k: int) -> str:
    """What RL changed, with its interval where the evaluation has paired the two."""
    paired = measured.difference(after, before, k)
    if paired:
        return interval(paired, signed=True)
    first, last = measured.score(before, k), measured.score(after, k)
    return number(last["value"] - first["value"], signed=True) if first and last else NONE


def before_and_after(measured: RunData, k: int) -> Panel | None:
    """pass@k of every arm at both ends of RL; in a study, means over seeds."""
    if measured.study:
        arms = measured.study["arms"].items()
        ends = {name: [arm[when].get(f"pass@{k}", {}) for when in WHEN] for name, arm in arms}
    else:
        ends = {
            arm.name: [
                measured.score(label, k) or {} for label in (measured.before_rl(arm), arm.after_rl)
            ]
            for arm in measured.arms
        }
    lines = {}
    for place, (name, both) in enumerate(ends.items()):
        y, low, high = (as_floats(s.get(key) for s in both) for key in ("value", "low", "high"))
        beside = 0.06 * (place - (len(ends) - 1) / 2)
        lines[name] = Line(np.arange(2) + beside, y, low, high)
    base = measured.score("base", k)
    return draw(
        f"pass@{k} before and after RL",
        f"pass@{k}",
        lines,
        across="",
        level=(base["value"], "base") if base else None,
        ticks=("before RL", "after RL"),
    )


def differences(measured: RunData) -> Section | str:
    """Arms against each other on the same problems; a study compares them over seeds instead."""
    if measured.study:
        return "arms of one seed against each other (the study compares them over seeds)"
    rows: list[tuple[Cell, ...]] = []
    for found in measured.scorecard.get("differences", []):
        after_rl = is_after_rl(found["a"])
        if after_rl != is_after_rl(found["b"]):
            continue
        says = f"interval {'includes' if found['low'] <= 0 <= found['high'] else 'excludes'} 0"
        if after_rl:
            says += f", {'below' if abs(found['value']) < NOISE_FLOOR else 'not below'} the floor"
        floor = number(NOISE_FLOOR) if after_rl else NONE
        pair = f"{found['a']} - {found['b']}"
        rows.append((pair, f"pass@{found['k']}", interval(found, signed=True), floor, says))
    if not rows:
        return "paired differences (no two arms evaluated at the same point)"
    header = ("pair", "of", "difference [95 %]", "noise floor", "one seed says")
    return Section(
        "Arms against each other",
        "Both arms of a row answered the same problems with the same seeds; in brackets the 95 %"
        " interval over problems. The noise floor was found in miniature studies, after RL: two"
        f" nearly equal checkpoints ended about {number(NOISE)} apart, so that a difference below"
        f" {number(NOISE_FLOOR)} from one seed means nothing. Before RL none was measured.",
        (Table(header, tuple(rows)),),
    )


def learning(measured: RunData) -> Section | str:
    """SFT and the stage after it, step by step."""
    if not any(arm.of("sft") or arm.last for arm in measured.arms):
        return "learning curves (no rows of sft, rl or cooperate in metrics.jsonl)"

    def curve(arms: dict[str, list[Rows]], key: str, title: str, unit: str) -> Panel | None:
        return draw(title, unit, {name: over_seeds(seeds, key) for name, seeds in arms.items()})

    sft: dict[str, list[Rows]] = {}
    last: dict[str, list[Rows]] = {}
    for arm in measured.arms:
        name = arm.name.partition("@")[0]
        sft.setdefault(name, []).append(arm.of("sft"))
        last.setdefault(name, []).append(arm.last)

    return Section(
        "Learning",
        "Thin: every step; thick: mean over neighboring steps; of several seeds their mean, and a"
        " band from the lowest to the highest. The SFT loss of a weighted arm is"
        " weighted and cannot be compared with that of a plain one; the negative log-likelihood"
        " (nll) can. The pass rate is that of the training problems of each step. RL is stage rl or"
        " cooperate, which also learns from traces. In the table: means over the first and the last"
        " tenth of the steps.",
        (training_table(measured),),
        known(
            (
                curve(sft, "nll", "SFT: negative log-likelihood", "nats per token"),
                curve(sft, "loss", "SFT: loss, weighted where the arm is", "nats per token"),
                curve(sft, "entropy", "SFT: entropy", "nats per token"),
                curve(last, "pass_rate", "RL: pass rate", "share of answers"),
                curve(last, "entropy", "RL: entropy", "nats per token"),
                curve(last, "completions_mean_length", "RL: answer length", "tokens"),
                curve(last, "frac_reward_zero_std", "RL: groups without signal", "share"),
                curve(last, "grad_norm", "RL: gradient norm", "norm before clipping"),
                curve(last, "sft_nll", "RL: negative log-likelihood of traces", "nats per token"),
                curve(last, "cooperative_gain", "RL: gain over the shadow", "RL's objective"),
            )
        ),
    )


def over_seeds(seeds: list[Rows], key: str) -> Line:
    """One number by step; of several seeds their mean, and a band from lowest to highest."""
    lines = [line for rows in seeds if len((line := by_step(rows, key)).y)]
    if len(lines) < 2:
        return lines[0] if lines else by_step([], key)
    length = min(len(line.y) for line in lines)
    table = np.array([line.y[:length] for line in lines])
    return Line(lines[0].x[:length], table.mean(0), table.min(0), table.max(0))


def training_table(measured: RunData) -> Table:
    """Where training began and ended, one row per arm."""
    header = ("arm", "SFT steps", "SFT nll, nats", "RL steps", "RL pass rate", "tokens per answer")
    rows = [
        (
            arm.name,
            str(len(arm.of("sft"))),
            from_to(arm.values("sft", "nll")),
            str(len(arm.last)),
            from_to(arm.values(arm.last_stage, "pass_rate")),
            from_to(arm.values(arm.last_stage, "completions_mean_length")),
        )
        for arm in measured.arms
    ]
    return Table(header, tuple(rows))


def answers(measured: RunData) -> Section | str:
    """What answers look like."""
    cards = measured.cards
    if not cards:
        return "what answers look like (no evaluate/scorecard.json)"
    parts = sorted({part for card in cards.values() for part in card.get("parts", {})})
    header = ("checkpoint", "tokens per answer", "truncated", "log-prob per token", "held-out loss")
    rows = tuple(
        (
            label,
            number(card.get("completions_mean_length")),
            share(card.get("completions_clipped_ratio")),
            number(card.get("mean_logprob")),
            number(card.get("heldout_nll")),
            *(share(card.get("parts", {}).get(part)) for part in parts),
        )
        for label, card in cards.items()
    )
    return Section(
        "What the answers look like",
        "Means over all sampled answers. Log-prob per token is that of the sampler for its own"
        " answers, in nats; the held-out loss, in nats per token, is that of the corpus rows kept"
        " apart. Truncated is the share of answers cut off at the longest allowed length; the last"
        " columns are the facts which the task's verdict notes about an answer.",
        (
            Table((*header, *(part.replace("_", " ") for part in parts)), rows),
            *side_by_side(measured),
        ),
    )


def side_by_side(measured: RunData) -> list[Table]:
    """What checkpoints wrote to the same problems: to those on which their verdicts differ most."""
    labels = list(measured.cards)[:MOST_BESIDE_EACH_OTHER]
    by_problem: dict[str, dict[str, dict[str, Any]]] = {}
    for row in measured.answers:
        by_problem.setdefault(row["problem_id"], {})[row["checkpoint"]] = row

    def differing(name: str) -> tuple[float, str]:
        return -float(np.std([row["correct"] for row in by_problem[name].values()])), name

    rows: list[tuple[Cell, ...]] = []
    for name in sorted(by_problem, key=differing)[:PROBLEMS_SHOWN]:
        for label in labels:
            if (answer := by_problem[name].get(label)) is not None:
                text = answer["text"][:LONGEST_SHOWN] or NONE
                rows.append((name, label, "right" if answer["correct"] else "wrong", text))
    header = ("problem", "checkpoint", "judged", "first answer")
    return [Table(header, tuple(rows), "Answers beside each other")] if rows else []
