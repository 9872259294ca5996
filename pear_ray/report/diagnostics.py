"""Diagnostics: importance weights, behavior log-probs, engine/trainer parity, time, events."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from markupsafe import Markup

from pear_ray.report.elements import Line, Section, Table, by_step, clock, downsample, draw, ends
from pear_ray.report.load import ArmData, RunData, column, mean, means
from pear_ray.statistics import FRACTIONS

# Nats between engine and trainer that float32 rounding explains.
PARITY_TOLERANCE = 1e-4
MAX_EVENTS = 200
PARITY_METRICS = ("logprob_diff_mean", "ratio_mean", "clip_frac", "effective_sample_size")
SECONDS = ("step_seconds", "wait_seconds", "train_seconds", "publish_seconds", "pause_seconds", "engine_idle_seconds")
SCORES = ("rows", "from_behavior", "from_recorded", "from_reference", "response_tokens")
CALIBRATION = ("rows", "bias", "spread", "mean_gap", "max_gap")


def weights(data: RunData) -> Section:
    """Importance weights of SFT."""
    arms = [arm for arm in data.arms if arm.weighted]
    first = [
        {"arm": arm.name, "source": source, "mean": mean(values), "first to last": ends(values)}
        for arm in arms
        for source, values in first_weights(arm).items()
    ]
    metrics = ("weight_mean", "effective_sample_size", *FRACTIONS)
    averages = [{"arm": arm.name} | means(arm.weighted, metrics) for arm in arms]
    sizes = {arm.name: by_step(arm.weighted, "effective_sample_size") for arm in arms}
    tables = (
        Table(first, "Weight of the first token: all steps, first and last tenth"),
        Table(averages, "Means over all steps; frac: share of tokens"),
    )
    figures = [draw("SFT: effective sample size", "share of tokens", sizes)]
    return Section(tables, figures + [figure for arm in arms for figure in weight_figures(arm)])


def first_weights(arm: ArmData) -> dict[str, np.ndarray]:
    """Return the mean first-token weight of every source [steps]."""
    rows = [row["first_weight_by_source"] for row in arm.weighted]
    return {source: column(rows, source) for source in sorted({s for row in rows for s in row})}


def weight_figures(arm: ArmData) -> Iterator[Markup]:
    """Draw the weights of one arm: by source, their spread, along the answer."""
    rows, steps = arm.weighted, column(arm.weighted, "step")
    sources = {name: downsample(steps, values) for name, values in first_weights(arm).items()}
    yield draw(f"{arm.name}: first-token weight by source", "weight", sources, log=True, level=(1.0, "plain SFT"))
    quantiles = [row["weight_quantiles"] for row in rows]
    low, mid, high = (downsample(steps, column(quantiles, q)) for q in ("p05", "p50", "p95"))
    spread = {"median, 5 % to 95 %": Line(mid.x, mid.y, low.y, high.y)}
    yield draw(f"{arm.name}: weights", "weight", spread, log=True)
    tenth, along_answer = max(1, len(rows) // 10), {}
    for name, part in ((f"first {tenth} steps", rows[:tenth]), (f"last {tenth} steps", rows[-tenth:])):
        table = np.array([row["weight_by_position"] for row in part], np.float64)
        x = (np.arange(table.shape[1]) + 0.5) / table.shape[1]
        along_answer[name] = Line(x, np.array([mean(values) for values in table.T]))
    title, x_label = f"{arm.name}: weight along the answer", "position in the answer, 0 to 1"
    yield draw(title, "mean weight", along_answer, x_label=x_label)


def scores(data: RunData) -> Section:
    """The behavior policies' log-probs, and their calibration."""
    facts = data.folders[0].manifest.get("stages", {}).get("score", {}).get("facts")
    if not facts:
        return Section()
    sources = [
        {"source": source} | {key: row.get(key, 0) for key in SCORES} | {"recorded_gap_max": row["recorded_gap_max"]}
        for source, row in facts["sources"].items()
    ]
    calibration = [
        {"behavior model": source} | {key: row.get(key) for key in CALIBRATION}
        for source, row in facts["calibration"].items()
    ]
    caption = "Trainer minus engine on a sample. Bias: mean, spread: standard deviation"
    return Section((Table(sources), Table(calibration, caption)))


def parity(data: RunData) -> Section:
    """Engine against trainer."""
    arms = [arm for arm in data.arms if arm.last]
    rows = []
    for arm in arms:
        gaps, staleness = (column(arm.last, key) for key in ("logprob_parity_max", "staleness_max"))
        row = {"arm": arm.name, "largest gap": float(np.fmax.reduce(gaps, initial=np.nan))}
        row["steps above 1e-4"] = f"{np.count_nonzero(gaps > PARITY_TOLERANCE)} of {len(gaps)}"
        row |= means(arm.last, PARITY_METRICS)
        rows.append(row | {"staleness_max": float(np.fmax.reduce(staleness, initial=np.nan))})
    lines = {arm.name: by_step(arm.last, "logprob_parity_max", np.max) for arm in arms}
    level = (PARITY_TOLERANCE, "1e-4")
    return Section((Table(rows),), [draw("RL: log-prob parity", "largest gap, nats", lines, log=True, level=level)])


def seconds(data: RunData) -> Section:
    """Time of stages and of RL steps."""
    stages = [
        {"run or arm": arm.name, "stage": stage} | {key: entry.get(key) for key in ("state", "seconds")}
        for arm in data.folders
        for stage, entry in arm.manifest.get("stages", {}).items()
        # The stage that writes this report has not finished.
        if stage not in ("report", "pipeline")
    ]
    steps = [{"arm": arm.name} | means(arm.last, SECONDS) for arm in data.arms if arm.last]
    return Section((Table(stages, "Stages"), Table(steps, "Means over RL steps")))


def events(data: RunData) -> Section:
    """Failures, restarts and resumes, oldest first."""
    found = [
        {"time": event.get("time", 0.0), "run or arm": arm.name}
        | {key: event.get(key) for key in ("stage", "kind", "text")}
        for arm in data.folders
        for event in arm.events
    ]
    last = sorted(found, key=lambda row: row["time"])[-MAX_EVENTS:]
    text = f"Failures, restarts and resumes: the last {len(last)} of {len(found)}."
    return Section((Table([row | {"time": clock(row["time"])} for row in last]),), text=text)
