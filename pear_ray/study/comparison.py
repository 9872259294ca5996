"""The study's table: offline score, score after RL, paired differences, reversals, cost."""

from __future__ import annotations

import csv
import io
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from pear_ray.config import Arm, Job, start_of
from pear_ray.rank import predictors
from pear_ray.statistics import mean_over_seeds

WHEN = BEFORE, AFTER = "before RL", "after RL"


def comparison(job: Job, folder: Path) -> dict[str, Any]:
    """Means over seeds with 95 % intervals, and differences seed by seed, of an evaluated study."""
    cards = json.loads((folder / "evaluate" / "scorecard.json").read_text())["checkpoints"]
    seeds, of_study = job.study.seeds, {arm.name: arm for arm in job.study_arms}
    names = list(of_study)
    baseline, first_k = job.study.baseline or names[0], min(job.evaluation.ks)

    def scores(name: str, when: str, k: int) -> np.ndarray:
        after = [f"{name}@{seed}/{of_study[name].last_stage}" for seed in seeds]
        labels = after if when == AFTER else [start_of(label, cards) for label in after]
        return np.array([cards[label]["pass_at_k"][str(k)]["value"] for label in labels])

    arms = {
        name: {
            when: {f"pass@{k}": of_seeds(scores(name, when, k)) for k in job.evaluation.ks}
            for when in WHEN
        }
        | {"seconds": seconds_of(job, folder, arm)}
        for name, arm in of_study.items()
    }
    differences = [
        {
            "arm": name,
            "baseline": baseline,
            "when": when,
            "of": f"pass@{k}",
            **of_seeds(scores(name, when, k) - scores(baseline, when, k)),
        }
        for name in names
        if name != baseline
        for when in WHEN
        for k in job.evaluation.ks
    ]
    before, after = (
        np.array([scores(name, when, first_k).mean() for name in names]) for when in WHEN
    )
    primary = [row for row in differences if (row["when"], row["of"]) == (AFTER, f"pass@{first_k}")]
    return {
        "seeds": list(seeds),
        "baseline": baseline,
        "arms": arms,
        "differences": differences,
        "primary": primary,
        "spearman_before_and_after": predictors.spearman(before, after),
        "reversals": reversals(names, before, after),
    }


def of_seeds(values: np.ndarray) -> dict[str, Any]:
    """Mean over seeds, its standard error and 95 % interval, and the seeds one by one."""
    return {**mean_over_seeds(values), "by_seed": values.tolist()}


def seconds_of(job: Job, folder: Path, arm: Arm) -> dict[str, float]:
    """What SFT and the last stage of an arm cost, mean over seeds, with attempts that were killed;
    nothing where it had no such stage."""
    homes = job.homes(folder)
    found: dict[str, list[float]] = {stage: [] for stage in ("sft", arm.last_stage)}
    for seed in job.study.seeds:
        manifest = json.loads((homes[f"{arm.name}@{seed}"] / "manifest.json").read_text())
        for stage, seconds in found.items():
            entry = manifest["stages"].get(stage, {})
            seconds.append(entry.get("seconds", 0.0) + entry.get("seconds_before", 0.0))
    return {stage: float(np.mean(seconds)) for stage, seconds in found.items()}


def reversals(names: list[str], before: np.ndarray, after: np.ndarray) -> list[dict[str, str]]:
    """Pairs of arms of which the one with the better mean before RL has the worse after it."""
    return [
        {"better_before": names[i], "better_after": names[j]}
        for one, other in combinations(range(len(names)), 2)
        for i, j in ((one, other), (other, one))
        if before[i] > before[j] and after[i] < after[j]
    ]


def spreadsheet(found: dict[str, Any]) -> str:
    """One line for each arm, point in time and measure."""
    file = io.StringIO()
    columns = ["arm", "when", "of", "value", "standard_error", "low", "high"]
    by_seed = [f"seed {seed}" for seed in found["seeds"]]
    table = csv.DictWriter(file, columns + by_seed, lineterminator="\n")
    table.writeheader()
    for name, arm in found["arms"].items():
        for when in WHEN:
            for of, score in arm[when].items():
                row = {key: score[key] for key in columns if key in score}
                values = dict(zip(by_seed, score["by_seed"], strict=True))
                table.writerow({"arm": name, "when": when, "of": of, **row, **values})
    return file.getvalue()
