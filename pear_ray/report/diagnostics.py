"""How it came about: weights, scores, agreement of generators and learners, time, events."""

from __future__ import annotations

from typing import Any

import numpy as np

from pear_ray.report.figures import Line, by_step, draw, gathered
from pear_ray.report.format import NONE, clock, ends, largest, mean, number, share
from pear_ray.report.load import ArmData, RunData, as_floats
from pear_ray.report.section import Cell, Panel, Section, Table, known

WANTED_GAP = 1e-4
"""Nats between generator and learner that float32 rounding explains."""
MAX_EVENTS = 200


def weights(measured: RunData) -> Section | str:
    """What the importance weights did."""
    weighted = [arm for arm in measured.arms if arm.weighted]
    if not weighted:
        return "importance weights (no arm has weighted SFT steps)"
    sizes = {arm.name: by_step(arm.weighted, "effective_sample_size") for arm in weighted}
    panels = [draw("SFT: effective sample size", "share of the tokens", sizes)]
    for arm in weighted:
        panels += weight_panels(arm)
    return Section(
        "Importance weights",
        "The weight of an answer's first token gathers the log-ratios of the answer: its mean by"
        " source shows which sources the policy is made to learn from, 1 being plain SFT."
        " Effective sample size is (sum w)^2 / (sum w^2) over the tokens of a step, as a share of"
        " them: 1 when all weights are equal. A token at a clip has the bound instead of its own"
        " log-ratio, one at floor or ceiling the bound of its log-weight.",
        (first_weight_table(weighted), weight_table(weighted)),
        known(panels),
    )


def first_weights(arm: ArmData) -> dict[str, np.ndarray]:
    """First-token weight of every source, by step."""
    rows = [row["first_weight_by_source"] for row in arm.weighted]
    sources = sorted({source for row in rows for source in row})
    return {source: as_floats(row.get(source) for row in rows) for source in sources}


def first_weight_table(weighted: list[ArmData]) -> Table:
    """Arm by source."""
    rows: list[tuple[Cell, ...]] = []
    for arm in weighted:
        for source, values in first_weights(arm).items():
            first, last = ends(values)
            rows.append((arm.name, source, number(mean(values)), number(first), number(last)))
    header = ("arm", "source", "first-token weight", "first tenth of steps", "last tenth of steps")
    return Table(header, tuple(rows), "Weight of the first token, by source")


def weight_table(weighted: list[ArmData]) -> Table:
    """Means over all steps, one row per arm."""
    columns = {
        "weight_mean": "mean weight",
        "effective_sample_size": "effective sample size",
        "clip_frac_low": "at lower clip",
        "clip_frac_high": "at upper clip",
        "weight_frac_at_floor": "at floor",
        "weight_frac_at_ceiling": "at ceiling",
    }
    rows = []
    for arm in weighted:
        means = {key: mean(as_floats(row.get(key) for row in arm.weighted)) for key in columns}
        cells = [share(v) if "share" in key else number(v) for key, v in means.items()]
        rows.append((arm.name, *cells))
    return Table(("arm", *columns.values()), tuple(rows), "Means over all steps; shares of tokens")


def weight_panels(arm: ArmData) -> list[Panel | None]:
    """Weights of one arm: by source, at the bounds, their spread, and along the answer."""
    rows = arm.weighted
    steps = as_floats(row["step"] for row in rows)
    names = ("clip_frac_low", "clip_frac_high", "weight_frac_at_floor", "weight_frac_at_ceiling")
    clips = {name.replace("_", " "): by_step(rows, name) for name in names}
    p05, p50, p95 = (
        gathered(steps, as_floats(row["weight_quantiles"].get(q) for row in rows))
        for q in ("p05", "p50", "p95")
    )
    spread = {"median, 5 % to 95 %": Line(p50.x, p50.y, p05.y, p95.y)}
    tenth = max(1, len(rows) // 10)
    positions = {
        f"{name} {tenth} step{'s' * (tenth > 1)}": along_answer(part)
        for name, part in (("first", rows[:tenth]), ("last", rows[-tenth:]))
    }
    sources = {source: gathered(steps, values) for source, values in first_weights(arm).items()}
    return [
        draw(
            f"{arm.name}: first-token weight by source",
            "weight",
            sources,
            log=True,
            level=(1.0, "plain SFT"),
        ),
        draw(f"{arm.name}: tokens at a bound", "share of the tokens", clips),
        draw(f"{arm.name}: weights", "weight", spread, log=True),
        draw(
            f"{arm.name}: weight along the answer",
            "mean weight",
            positions,
            across="place in the answer, 0 to 1",
        ),
    ]


def along_answer(rows: list[dict[str, Any]]) -> Line:
    """Mean weight over these steps at each part of the answer."""
    table = np.array([as_floats(row["weight_by_position"]) for row in rows])
    num_parts = table.shape[1]
    return Line((np.arange(num_parts) + 0.5) / num_parts, np.array([mean(c) for c in table.T]))


def scores(measured: RunData) -> Section | str:
    """The behavior policies' log-probs."""
    facts = measured.own.manifest.get("stages", {}).get("score", {}).get("facts")
    if not facts:
        return "scores of the corpus (stage score has not run in this folder)"
    origins = ("from_behavior", "from_recorded", "from_reference")
    by_source = tuple(
        (
            source,
            str(row["rows"]),
            *(str(row.get(origin, 0)) for origin in origins),
            str(row["response_tokens"]),
            number(row["recorded_gap_max"]),
        )
        for source, row in facts["sources"].items()
    )
    by_model = tuple(
        (
            source,
            str(row["rows"]),
            *(number(row.get(key)) for key in ("bias", "spread", "mean_gap", "max_gap")),
        )
        for source, row in facts["calibration"].items()
    )
    return Section(
        "Scores of the corpus",
        "Log-probability of every response token under the policy that wrote it: scored here,"
        " brought along and confirmed by a probe, or scored by a reference where the author is"
        " unknown. The gap is the largest difference to log-probs that were brought along, a dash"
        " where there were none. The second table compares, on the probe, the trainer's forward"
        " pass with the engine that scored: bias and spread (mean and standard deviation of trainer"
        " minus engine) are noise in PEAR's log-ratios from the first step on."
        f" Rejected rows, all sources together: {facts['rejected']} of {facts['rows']}.",
        (
            Table(
                ("source", "rows", "scored", "recorded", "reference", "response tokens",
                 "largest gap, nats"),
                by_source,
            ),
            Table(
                ("behavior model", "probe rows", "bias, nats", "spread, nats",
                 "mean gap, nats", "largest gap, nats"),
                by_model,
            ),
        ),
    )  # fmt: skip


def agreement(measured: RunData) -> Section | str:
    """Generator against learner."""
    arms = [arm for arm in measured.arms if arm.last]
    if not arms:
        return "generator and learner agreement (no rows of rl or cooperate in metrics.jsonl)"
    header = (
        "arm",
        "largest probe gap, nats",
        "steps above 1e-4",
        "mean mismatch",
        "mean ratio",
        "clipped",
        "effective sample size",
        "largest staleness, steps",
    )
    rows: list[tuple[Cell, ...]] = []
    for arm in arms:
        gaps = arm.values(arm.last_stage, "logprob_parity_max")
        names = ("logprob_diff_mean", "ratio_mean", "clip_frac", "effective_sample_size")
        means = [number(mean(arm.values(arm.last_stage, name))) for name in names]
        above = f"{np.count_nonzero(gaps > WANTED_GAP)} of {len(gaps)}"
        stale = number(largest(arm.values(arm.last_stage, "staleness_max")), digits=0)
        rows.append((arm.name, number(largest(gaps)), above, *means, stale))
    lines = {arm.name: by_step(arm.last, "logprob_parity_max", np.max) for arm in arms}
    return Section(
        "Do generators and learners hold the same weights?",
        "At every step a fixed set of answers, the probe, is scored by both sides under the same"
        " weights version; the gap is the largest difference over its tokens. 1e-4 nats"
        " is what rounding explains in float32; lower precision shows more. Mismatch, ratio and"
        " clipped share are means over the tokens of the rollouts and all steps.",
        (Table(header, tuple(rows)),),
        known([draw("RL: probe gap", "nats", lines, log=True, level=(WANTED_GAP, "1e-4"))]),
    )


def spent(measured: RunData) -> Section | str:
    """Where the time went."""
    rows: list[tuple[Cell, ...]] = []
    for home in measured.homes:
        stages = home.manifest.get("stages", {})
        # This report is being written by one of the two, so neither can say how long it took.
        counted = {name: s for name, s in stages.items() if name not in ("report", "pipeline")}
        for name, entry in counted.items():
            seconds = number(entry.get("seconds"), digits=1)
            rows.append((home.name, name, entry.get("state", NONE), seconds))
    tables = (
        [Table(("run or arm", "stage", "state", "seconds"), tuple(rows), "Stages")] if rows else []
    )
    arms = [arm for arm in measured.arms if arm.last]
    if arms:
        tables += step_tables(arms)
    if not tables:
        return "times (no stage in manifest.json)"
    return Section(
        "Where the time went",
        "Learners and generators are two sides of one step: unless rollouts run ahead, the"
        " learners' wait is the time in which the generators take over weights and sample. Bars are"
        " shares of the whole step as learners see it.",
        tuple(tables),
    )


def step_tables(arms: list[ArmData]) -> list[Table]:
    """Mean seconds of one RL step, by what they went to on either side."""
    learners = {"wait_seconds": "wait for rollouts", "train_seconds": "learn"}
    learners |= {"publish_seconds": "publish weights"}
    generators = {"pause_seconds": "take over weights", "engine_idle_seconds": "idle"}
    tables = []
    for side, parts in {"learners": learners, "generators": generators}.items():
        rows: list[tuple[Cell, ...]] = []
        for arm in arms:
            step = mean(arm.values(arm.last_stage, "step_seconds"))
            means = [mean(arm.values(arm.last_stage, key)) for key in parts]
            rest = max(0.0, step - float(np.nansum(means)))
            rows.append((arm.name, number(step), *(share(s, step) for s in (*means, rest))))
        header = ("arm", "whole step", *parts.values(), "everything else")
        tables.append(Table(header, tuple(rows), f"One RL step of the {side}, mean seconds"))
    return tables


def happened(measured: RunData) -> Section | str:
    """What was out of the ordinary."""
    found = [(home.name, event) for home in measured.homes for event in home.events]
    if not found:
        return "events (none were noted)"
    found.sort(key=lambda entry: entry[1].get("time", 0.0))
    shown = found[-MAX_EVENTS:]
    rows = tuple(
        (
            clock(event.get("time", 0.0)),
            name,
            *(str(event.get(key, NONE)) for key in ("stage", "kind", "text")),
        )
        for name, event in shown
    )
    cut = "" if len(shown) == len(found) else f" The last {len(shown)} of {len(found)}."
    return Section(
        "Events",
        f"Failures, restarts and resumes, and what was done about them.{cut}",
        (Table(("time", "run or arm", "stage", "kind", "what happened"), rows),),
    )
