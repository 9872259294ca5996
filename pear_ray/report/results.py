"""Results: pass@k of the arms, their differences, a study over seeds, learning curves, answers."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from pear_ray.config import is_after_rl
from pear_ray.report.figures import Line, by_step, draw
from pear_ray.report.format import Section, Table, crosses_zero, ends, interval, number
from pear_ray.report.load import Rows, RunData, column, settings

WHEN = ("before RL", "after RL")
# pass@1 between two nearly equal checkpoints after RL, measured over seeds in small studies.
SEED_NOISE = 0.02
# A smaller difference from one seed means nothing.
NOISE_FLOOR = 0.04
MAX_CHECKPOINTS = 8
NUM_PROBLEMS = 3
MAX_CHARACTERS = 600
# Stage, metric, title, unit.
CURVES = (
    ("SFT", "nll", "negative log-likelihood", "nats per token"),
    ("SFT", "loss", "loss, weighted if the arm is", "nats per token"),
    ("SFT", "entropy", "entropy", "nats per token"),
    ("RL", "pass_rate", "pass rate", "share of answers"),
    ("RL", "entropy", "entropy", "nats per token"),
    ("RL", "completions_mean_length", "answer length", "tokens"),
    ("RL", "frac_reward_zero_std", "groups without signal", "share of groups"),
    ("RL", "grad_norm", "gradient norm", "norm before clipping"),
    ("RL", "sft_nll", "negative log-likelihood of demonstrations", "nats per token"),
    ("RL", "cooperative_gain", "gain over the shadow model", "RL objective"),
)


def conclusion(data: RunData) -> str:
    """Return the main result in one or two sentences."""
    if data.study:
        primary = [
            f"{row['arm']} - {row['baseline']} {interval(row, signed=True)} ({crosses_zero(row)})"
            for row in data.study["primary"]
        ]
        metric, seeds = data.study["primary"][0]["metric"], data.study["seeds"]
        return f"After RL, {metric} over {len(seeds)} seeds: {'; '.join(primary)}."
    if not data.cards:
        return "No checkpoint has been evaluated: there is no result yet."
    k = data.ks[0]
    scores = [(data.score(arm.after_rl, k), arm) for arm in data.arms]
    ranked = sorted(((s["value"], arm) for s, arm in scores if s), key=lambda pair: -pair[0])
    if not ranked:
        return f"No checkpoint has been evaluated after RL: pass@{k} is known before it only."
    texts = [f"{arm.name} {number(value)}" for value, arm in ranked]
    text = f"pass@{k} after RL: {', '.join(texts)}."
    first, second = ranked[0][1], ranked[1 % len(ranked)][1]
    if paired := data.difference(first.after_rl, second.after_rl, k):
        side = "below" if abs(paired["value"]) < NOISE_FLOOR else "not below"
        text += (
            f" {first.name} - {second.name}: {interval(paired, signed=True)}, paired over"
            f" {data.scorecard['num_problems']} problems. The 95 % interval {crosses_zero(paired)};"
            f" the difference is {side} the noise floor of {number(NOISE_FLOOR)}."
        )
    return text


def caution(data: RunData) -> str:
    """Return which uncertainty the intervals leave out."""
    if data.study:
        return (
            f"Student's 95 % intervals over {len(data.study['seeds'])} seeds, not corrected for the number of"
            " comparisons. All seeds share one base model, one corpus and one set of problems."
        )
    return (
        f"One seed ({data.job.run.seed}) proves nothing: two nearly equal checkpoints end about"
        f" {number(SEED_NOISE)} apart after RL, so a difference below {number(NOISE_FLOOR)} means"
        " nothing. Intervals cover the choice of problems, not the randomness of training."
    )


def study(data: RunData) -> Section | None:
    """Arms over seeds, and their differences seed by seed."""
    if not data.study:
        return None
    found, plan = data.study, data.study["plan"]
    text = f"Primary metric: {plan['primary']}, against {found['baseline']}."
    if plan["hypothesis"]:
        text += f' Hypothesis, written before the first run: "{plan["hypothesis"]}".'
    if found["spearman"] is not None:
        text += f" Order of the arms before and after RL: Spearman {found['spearman']:.2f}."
    for pair in found["reversals"]:
        better, worse = pair["better_before"], pair["better_after"]
        text += f" {better} is ahead of {worse} before RL and behind it after."
    arms = [
        {"arm": name}
        | {f"{metric} {when}": arm[when][metric] for metric in arm[WHEN[0]] for when in WHEN}
        | dict(zip(("SFT, s", "RL, s"), map(round, arm["seconds"].values()), strict=True))
        for name, arm in found["arms"].items()
    ]
    differences = [
        {
            "pair": f"{row['arm']} - {row['baseline']}",
            "metric": f"{row['metric']} {row['when']}",
            "difference": interval(row, signed=True),
            "seed by seed": ", ".join(number(value, signed=True) for value in row["by_seed"]),
        }
        for row in found["differences"]
    ]
    tables = (
        Table(arms, f"Means over {len(found['seeds'])} seeds [95 %]"),
        Table(differences, "Differences, paired over seeds [95 %]"),
    )
    return Section("Study", text, tables)


def arms(data: RunData) -> Section | None:
    """pass@k before and after RL."""
    card = data.scorecard
    if not card:
        return None
    rows: list[dict[str, Any]] = []
    for k in data.ks:
        for name, before, after in checkpoint_pairs(data):
            scores = {when: data.score(c, k) for when, c in zip(WHEN, (before, after), strict=True)}
            row = {"arm": name, "metric": f"pass@{k}", **scores}
            rows.append(row | {"change": change(data, before, after, k)})
    return Section(
        "Results by arm",
        f"pass@k on {card['num_problems']} held-out problems, {card['samples_per_problem']} answers"
        f" each, temperature {card['temperature']}, seed {card['seed']}, with 95 % intervals over"
        f" problems. Before RL means after SFT. Settings by arm: {settings(data.job) or '-'}.",
        (Table(rows),),
        [before_and_after(data, k) for k in data.ks],
    )


def checkpoint_pairs(data: RunData) -> list[tuple[str, str, str]]:
    """Return name, and labels of the checkpoints before and after RL, of every row of results."""
    trained = {label for arm in data.arms for label in (f"{arm.prefix}sft", arm.after_rl)}
    return [(label, label, "") for label in data.cards if label not in trained] + [
        (arm.name, data.before_rl(arm), arm.after_rl) for arm in data.arms
    ]


def change(data: RunData, before: str, after: str, k: int) -> str | None:
    """Return the change of pass@k through RL, with its interval if it was evaluated."""
    if paired := data.difference(after, before, k):
        return interval(paired, signed=True)
    first, last = data.score(before, k), data.score(after, k)
    return number(last["value"] - first["value"], signed=True) if first and last else None


def before_and_after(data: RunData, k: int) -> Markup:
    """Draw pass@k of every arm before and after RL; in a study, means over seeds."""
    pairs = {
        arm.name: [data.score(label, k) or {} for label in (data.before_rl(arm), arm.after_rl)] for arm in data.arms
    }
    if data.study:
        arms = data.study["arms"].items()
        pairs = {name: [arm[when].get(f"pass@{k}", {}) for when in WHEN] for name, arm in arms}
    lines = {}
    for place, (name, pair) in enumerate(pairs.items()):
        x = np.arange(2) + 0.06 * (place - (len(pairs) - 1) / 2)
        lines[name] = Line(x, *(column(pair, key) for key in ("value", "low", "high")))
    base = data.score("base", k)
    level = (base["value"], "base") if base else None
    title = f"pass@{k} before and after RL"
    return draw(title, f"pass@{k}", lines, x_label="", level=level, ticks=WHEN)


def differences(data: RunData) -> Section | None:
    """Differences between arms, paired over problems; a study has them over seeds instead."""
    rows = []
    for row in data.scorecard.get("differences", []):
        after_rl = is_after_rl(row["a"])
        if after_rl == is_after_rl(row["b"]) and not data.study:
            columns = {"pair": f"{row['a']} - {row['b']}", "metric": f"pass@{row['k']}"}
            columns |= {"difference": interval(row, signed=True), "interval": crosses_zero(row)}
            floor = "below" if abs(row["value"]) < NOISE_FLOOR else "not below"
            columns[f"noise floor {number(NOISE_FLOOR)}"] = floor if after_rl else "-"
            rows.append(columns)
    text = (
        "Both arms of a pair answered the same problems with the same seeds; 95 % intervals over"
        " problems. The noise floor applies to pass@1 after RL from one seed."
    )
    return Section("Differences between arms", text, (Table(rows),)) if rows else None


def learning(data: RunData) -> Section | None:
    """SFT and RL, step by step."""
    if not any(arm.of("sft") or arm.last for arm in data.arms):
        return None
    seeds: dict[str, dict[str, list[Rows]]] = {"SFT": {}, "RL": {}}
    for arm in data.arms:
        name = arm.name.partition("@")[0]
        seeds["SFT"].setdefault(name, []).append(arm.of("sft"))
        seeds["RL"].setdefault(name, []).append(arm.last)
    figures = []
    for stage, key, title, unit in CURVES:
        lines = {name: over_seeds(rows, key) for name, rows in seeds[stage].items()}
        figures.append(draw(f"{stage}: {title}", unit, lines))
    return Section(
        "Learning curves",
        "Thick: mean over neighboring steps. Several seeds: their mean, with a band from lowest to highest. RL is stage"
        " rl or cooperate; pass rate is that of the training problems. The loss of a weighted arm is not comparable"
        " with that of a plain one; the negative log-likelihood (nll) is. In the table, means over the first and the"
        " last tenth of the steps.",
        (training(data),),
        figures,
    )


def over_seeds(seeds: list[Rows], key: str) -> Line:
    """Return a metric by step; of several seeds the mean, with a band from lowest to highest."""
    lines = [line for line in (by_step(rows, key) for rows in seeds) if len(line.y)]
    if len(lines) < 2:
        return lines[0] if lines else by_step([], key)
    length = min(len(line.y) for line in lines)
    values = np.array([line.y[:length] for line in lines])
    return Line(lines[0].x[:length], values.mean(0), values.min(0), values.max(0))


def training(data: RunData) -> Table:
    """Return the first and the last tenth of training, one row per arm."""
    return Table(
        [
            {
                "arm": arm.name,
                "SFT steps": len(arm.of("sft")),
                "SFT nll, nats": ends(column(arm.of("sft"), "nll")),
                "RL steps": len(arm.last),
                "RL pass rate": ends(column(arm.last, "pass_rate")),
                "tokens per answer": ends(column(arm.last, "completions_mean_length")),
            }
            for arm in data.arms
        ]
    )


def answers(data: RunData) -> Section | None:
    """Length and likelihood of the answers, and some of them side by side."""
    if not data.cards:
        return None
    parts = sorted({part for card in data.cards.values() for part in card.get("parts", {})})
    keys = ("completions_mean_length", "completions_clipped_ratio", "mean_logprob", "heldout_nll")
    rows = [
        {"checkpoint": label}
        | {key: card.get(key) for key in keys}
        | {part: card.get("parts", {}).get(part) for part in parts}
        for label, card in data.cards.items()
    ]
    return Section(
        "Answers",
        "Means over all sampled answers: tokens, share cut off at the length limit, log-prob per"
        " token under the checkpoint (nats), then the properties recorded by the reward function."
        " Held-out nll: of the held-out corpus rows, nats per token.",
        (Table(rows), Table(side_by_side(data), "Problems on which the grades differ most")),
    )


def side_by_side(data: RunData) -> list[dict[str, Any]]:
    """Return the checkpoints' answers to the problems on which their grades differ most."""
    by_problem: dict[str, dict[str, dict[str, Any]]] = {}
    for answer in data.answers:
        by_problem.setdefault(answer["problem_id"], {})[answer["checkpoint"]] = answer

    def spread(problem: str) -> tuple[float, str]:
        return -float(np.std([row["correct"] for row in by_problem[problem].values()])), problem

    rows = []
    for problem in sorted(by_problem, key=spread)[:NUM_PROBLEMS]:
        for label in list(data.cards)[:MAX_CHECKPOINTS]:
            if answer := by_problem[problem].get(label, {}):
                grade = "correct" if answer["correct"] else "wrong"
                row = {"problem": problem, "checkpoint": label, "grade": grade}
                rows.append(row | {"first answer": answer["text"][:MAX_CHARACTERS]})
    return rows
