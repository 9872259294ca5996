"""Results: pass@k of the arms, a study over seeds, differences, the ranking for RL, learning curves, answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from markupsafe import Markup

from pear_ray.config import Cooperate, Job, is_after_rl
from pear_ray.report.elements import Line, Section, Table, by_step, crosses_zero, draw, ends, interval, number
from pear_ray.report.load import Rows, RunData, column
from pear_ray.run import flatten

WHEN = ("before RL", "after RL")
# pass@1 between two nearly equal checkpoints after RL, measured over seeds in small studies.
SEED_NOISE = 0.02
# A smaller difference from one seed means nothing.
NOISE_FLOOR = 0.04
MAX_CHECKPOINTS = 8
NUM_PROBLEMS = 3
MAX_CHARACTERS = 600
# Columns of the ranking: how a candidate stands, what to expect of RL, how far training moved the parameters.
STANDING = ("rank", "label", "pass_at_1", "pass_at_k", "probability_of_first", "heldout_loss", "regime")
EXPECTED = ("group_signal", "share_without_signal", "entropy", "after_rl", "predicted_after_rl")
MOVE = ("sft_move", "rl_move", "cosine", "sft_stable_rank_median", "rl_stable_rank_median")
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
        primary = data.study["primary"]
        leads = [f"{r['arm']} - {r['baseline']} {interval(r, signed=True)} ({crosses_zero(r)})" for r in primary]
        return f"After RL, {primary[0]['metric']} over {len(data.study['seeds'])} seeds: {'; '.join(leads)}."
    if not data.cards:
        return "No checkpoint has been evaluated: there is no result yet."
    k = data.ks[0]
    scores = [(data.score(arm.after_rl, k), arm) for arm in data.arms]
    ranked = sorted(((s["value"], arm) for s, arm in scores if s), key=lambda pair: -pair[0])
    if not ranked:
        return f"No checkpoint has been evaluated after RL: pass@{k} is known before it only."
    text = f"pass@{k} after RL: {', '.join(f'{arm.name} {number(value)}' for value, arm in ranked)}."
    first, second = ranked[0][1], ranked[1 % len(ranked)][1]
    if paired := data.difference(first.after_rl, second.after_rl, k):
        side = "below" if abs(paired["value"]) < NOISE_FLOOR else "not below"
        text += (
            f" {first.name} - {second.name}: {interval(paired, signed=True)}, paired over"
            f" {data.scorecard['num_problems']} problems. The 95 % interval {crosses_zero(paired)}; the difference is"
            f" {side} the noise floor of {number(NOISE_FLOOR)}."
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
        f"One seed ({data.job.run.seed}) proves nothing: two nearly equal checkpoints end about {number(SEED_NOISE)}"
        f" apart after RL, so a difference below {number(NOISE_FLOOR)} means nothing. Intervals cover the choice of"
        " problems, not the randomness of training."
    )


def study(data: RunData) -> Section:
    """Arms over seeds, and their differences seed by seed."""
    if not data.study:
        return Section()
    found, plan = data.study, data.study["plan"]
    text = f"Primary metric: {plan['primary']}, against {found['baseline']}."
    if plan["hypothesis"]:
        text += f' Hypothesis, written before the first run: "{plan["hypothesis"]}".'
    if found["spearman"] is not None:
        text += f" Order of the arms before and after RL: Spearman {found['spearman']:.2f}."
    for pair in found["reversals"]:
        text += f" {pair['better_before']} is ahead of {pair['better_after']} before RL and behind it after."
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
    means = Table(arms, f"Means over {len(found['seeds'])} seeds [95 %]")
    return Section((means, Table(differences, "Differences, paired over seeds [95 %]")), text=text)


def arms(data: RunData) -> Section:
    """pass@k before and after RL."""
    card = data.scorecard
    if not card:
        return Section()
    trained = {label for arm in data.arms for label in (f"{arm.prefix}sft", arm.after_rl)}
    pairs = [(label, label, "") for label in data.cards if label not in trained]
    pairs += [(arm.name, data.before_rl(arm), arm.after_rl) for arm in data.arms]
    rows: list[dict[str, Any]] = []
    for k in data.ks:
        for name, before, after in pairs:
            first, last = data.score(before, k), data.score(after, k)
            change = number(last["value"] - first["value"], signed=True) if first and last else None
            if paired := data.difference(after, before, k):
                change = interval(paired, signed=True)
            rows.append({"arm": name, "metric": f"pass@{k}", "before RL": first, "after RL": last, "change": change})
    text = (
        f"pass@k on {card['num_problems']} held-out problems, {card['samples_per_problem']} answers each, temperature"
        f" {card['temperature']}, seed {card['seed']}, with 95 % intervals over problems. Before RL means after SFT."
        f" Settings by arm: {settings(data.job) or '-'}."
    )
    return Section((Table(rows),), [before_and_after(data, k) for k in data.ks], text)


def settings(job: Job) -> str:
    """Return "pear: sft.level = token; ...": the keys that each arm changes."""
    texts = []
    for arm in job.arms:
        changes: dict[str, Any] = {stage: getattr(arm, stage) for stage in arm.stages}
        if arm.cooperate is not None:
            changes["cooperate"] = {"method": (job.cooperate or Cooperate()).method.type, **arm.cooperate}
        keys = [f"{key} = {value}" for key, value in flatten(changes) if value != {}]
        texts.append(f"{arm.name}: {', '.join(['no SFT'] * (arm.sft is False) + keys) or 'none'}")
    return "; ".join(texts)


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
    return draw(f"pass@{k} before and after RL", f"pass@{k}", lines, x_label="", level=level, ticks=WHEN)


def differences(data: RunData) -> Section:
    """Differences between arms, paired over problems; a study has them over seeds instead."""
    rows = []
    for row in data.scorecard.get("differences", []):
        after_rl = is_after_rl(row["a"])
        if after_rl == is_after_rl(row["b"]) and not data.study:
            columns = {"pair": f"{row['a']} - {row['b']}", "metric": f"pass@{row['k']}"}
            columns |= {"difference": interval(row, signed=True), "interval": crosses_zero(row)}
            floor = "below" if abs(row["value"]) < NOISE_FLOOR else "not below"
            rows.append(columns | {f"noise floor {number(NOISE_FLOOR)}": floor if after_rl else "-"})
    return Section((Table(rows),))


def ranking(data: RunData) -> Section:
    """The ranking of the checkpoints that RL could start from, how far training moved them, and pass@k for every k."""
    document = data.ranking
    if not document:
        return Section()
    record = document["track_record"]
    candidates = [{key: row.get(key) for key in STANDING + EXPECTED} for row in document["candidates"]]
    moves: list[dict[str, Any]] = []
    for arm in data.folders:
        if move := data.moves.get(arm.name):
            sft, rl = (data.cards.get(arm.prefix + s, {}).get("kl_from_start") for s in ("sft", arm.last_stage))
            row = {"arm": arm.name} | {key: move[key] for key in MOVE}
            moves.append(row | {"KL(base || SFT)": sft, "KL(SFT || RL)": rl})
    predictors = [{"predictor": name, **scores} for name, scores in record["predictors"].items()]
    distance = (
        "Distance of training: of the parameters |after - before| / |before|, of the policy KL over answers to held-out"
        " problems in nats per answer"
    )
    tables = (
        Table(candidates, f"Candidates; rank -: dropped. k = {document['k']}, groups of {document['group_size']}"),
        Table(predictors, f"Predictors on the {record['num_known']} candidates with a known result after RL"),
        Table([{"caution": text} for text in document["cautions"]]),
        Table(moves, distance),
    )
    return Section(tables, pass_at_k_curves(data), document["advice"])


def pass_at_k_curves(data: RunData) -> Iterator[Markup]:
    """Draw pass@k for k = 1, 2, 4, ... before and after RL; of several seeds mean and range."""
    curves: dict[str, list[list[dict[str, float]]]] = {}
    for label, card in data.cards.items():
        curve = card.get("pass_at_k_curve", [])
        points = [curve[2**power - 1] for power in range(len(curve).bit_length())]
        # "token/rl" for "token@3/rl", the label of one seed of an arm.
        curves.setdefault(re.sub(r"@\d+", "", label), []).append(points)
    for after in (False, True):
        lines: dict[str, Line] = {}
        for label, seeds in curves.items():
            if is_after_rl(label) == after:
                ends = ("low", "high") if len(seeds) == 1 else ("value", "value")
                value, low, high = (np.array([column(points, key) for points in seeds]) for key in ("value", *ends))
                x = np.arange(value.shape[1]) + 0.05 * len(lines)
                lines[label] = Line(x, value.mean(0), low.min(0), high.max(0))
        ticks = [str(2**power) for power in range(max((len(v.y) for v in lines.values()), default=0))]
        yield draw(f"pass@k {'after' if after else 'before'} RL", "pass@k", lines, x_label="k", ticks=ticks)


def learning(data: RunData) -> Section:
    """SFT and RL, step by step."""
    if not any(arm.of("sft") or arm.last for arm in data.arms):
        return Section()
    seeds: dict[str, dict[str, list[Rows]]] = {"SFT": {}, "RL": {}}
    for arm in data.arms:
        name = arm.name.partition("@")[0]
        seeds["SFT"].setdefault(name, []).append(arm.of("sft"))
        seeds["RL"].setdefault(name, []).append(arm.last)
    figures = []
    for stage, key, title, unit in CURVES:
        lines = {name: over_seeds(rows, key) for name, rows in seeds[stage].items()}
        figures.append(draw(f"{stage}: {title}", unit, lines))
    return Section((training(data),), figures)


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
    rows = [
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
    return Table(rows)


def answers(data: RunData) -> Section:
    """Length and likelihood of the answers, and some of them side by side."""
    parts = sorted({part for card in data.cards.values() for part in card.get("parts", {})})
    keys = ("completions_mean_length", "completions_clipped_ratio", "mean_logprob", "heldout_nll")
    rows = [
        {"checkpoint": label}
        | {key: card.get(key) for key in keys}
        | {part: card.get("parts", {}).get(part) for part in parts}
        for label, card in data.cards.items()
    ]
    return Section((Table(rows), Table(side_by_side(data), "Problems on which the grades differ most")))


def side_by_side(data: RunData) -> list[dict[str, Any]]:
    """Return the checkpoints' answers to the problems on which their grades differ most."""
    by_problem: dict[str, dict[str, dict[str, Any]]] = {}
    for answer in data.answers:
        by_problem.setdefault(answer["problem_id"], {})[answer["checkpoint"]] = answer
    spread = {name: float(np.std([row["correct"] for row in rows.values()])) for name, rows in by_problem.items()}
    rows = []
    for problem in sorted(by_problem, key=lambda problem: (-spread[problem], problem))[:NUM_PROBLEMS]:
        for label in list(data.cards)[:MAX_CHECKPOINTS]:
            if given := by_problem[problem].get(label):
                row = {"problem": problem, "checkpoint": label, "grade": "correct" if given["correct"] else "wrong"}
                rows.append(row | {"first answer": given["text"][:MAX_CHARACTERS]})
    return rows
