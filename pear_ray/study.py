"""Stage `study`: is an arm better than the baseline, over seeds?

    plan.json                               hypothesis, arms, seeds, primary metric
      -> pretrain, sample, score            shared by all arms and seeds
      -> sft, rl | cooperate                one Ray task per arm and seed, `study.max_parallel`
      -> evaluate, rank                     all checkpoints on the same problems
      -> study.json, study.csv, report      means over seeds, paired differences, reversals, cost

Interrupted, the same command resumes. With more arms or seeds the study grows.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections import deque
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import ray

from pear_ray import pipeline
from pear_ray.config import Arm, Job, start_of
from pear_ray.errors import require
from pear_ray.process import configure_logging
from pear_ray.rank import predictors
from pear_ray.run import RunDir, connect, open_run, write_json
from pear_ray.statistics import mean_over_seeds

log = logging.getLogger(__name__)

# A cell whose node dies is retried on another one and resumes.
MAX_RETRIES = 3
WAIT_SECONDS = 10.0
WHEN = BEFORE, AFTER = "before RL", "after RL"


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Run every stage; raise ConfigError if there are fewer than two arms or two seeds."""
    require(len(job.study_arms) >= 2, "arms", "at least two to compare", len(job.study_arms))
    require(len(job.study.seeds) >= 2, "study.seeds", "at least two", list(job.study.seeds))
    plan = write_plan(job, run.folder / "study" / "plan.json")
    pipeline.prepare(job, run)
    run_cells(job)
    if run.is_done("evaluate") and not is_evaluated(job, run.folder):
        run.forget("evaluate")
    for name in ("evaluate", "rank"):
        run.run_stage(name, pipeline.load_stage(name))
    found = compare(job, run.folder) | {"plan": plan}
    (run.folder / "study" / "study.csv").write_text(spreadsheet(found))
    write_json(run.folder / "study" / "study.json", found)
    run.run_stage("report", pipeline.load_stage("report"))
    return {"primary": found["primary"]}


def write_plan(job: Job, path: Path) -> dict[str, Any]:
    """Write and return the plan of the study. Plans with fewer arms or seeds that were written before are kept under
    `earlier`, oldest first."""
    own_keys = {"sft", "rl", "cooperate"}
    plan: dict[str, Any] = {
        "hypothesis": job.study.hypothesis,
        "primary": f"pass@{min(job.evaluation.ks)} after RL, paired over seeds",
        "baseline": baseline_of(job),
        "arms": {arm.name: arm.model_dump(include=own_keys, exclude_none=True) for arm in job.study_arms},
        "seeds": list(job.study.seeds),
    }
    plan, earlier = json.loads(json.dumps(plan)), []
    if path.exists():
        previous = json.loads(path.read_text())
        earlier = previous.pop("earlier", [])
        if previous != plan:
            earlier.append(previous)
    plan["earlier"] = earlier
    path.parent.mkdir(exist_ok=True)
    write_json(path, plan)
    return plan


def baseline_of(job: Job) -> str:
    """Return the name of the arm that the others are compared with."""
    return job.study.baseline or job.study_arms[0].name


def run_cells(job: Job) -> None:
    """Train every arm with every seed; raise RayTaskError if one fails: the others resume when the study runs again."""
    connect()
    waiting = deque((arm, seed) for seed in job.study.seeds for arm in job.study_arms)
    running: dict[Any, str] = {}
    while waiting or running:
        while waiting and len(running) < job.study.max_parallel:
            arm, seed = waiting.popleft()
            ref = run_cell.remote(job.of_arm(arm, seed).model_dump(), arm.stages)
            running[ref] = f"{arm.name}@{seed}"
        finished, _ = ray.wait(list(running), num_returns=1, timeout=WAIT_SECONDS)
        for ref in finished:
            name = running.pop(ref)
            ray.get(ref)
            log.info("study: %s done, %d to go", name, len(waiting) + len(running))


@ray.remote(num_cpus=0, max_retries=MAX_RETRIES)
def run_cell(document: dict[str, Any], stages: tuple[str, ...]) -> None:
    """Train one arm with one seed, in a process anywhere on the cluster."""
    job = Job(**document)
    configure_logging(job.tracking.logs)
    with open_run(job) as run:
        for stage in stages:
            run.run_stage(stage, pipeline.load_stage(stage))


def is_evaluated(job: Job, folder: Path) -> bool:
    """Return whether the scorecard has every arm with every seed."""
    cards = json.loads((folder / "evaluate" / "scorecard.json").read_text())["checkpoints"]
    return set(cards).issuperset(label for arm in job.study_arms for label in labels(job, arm))


def labels(job: Job, arm: Arm) -> list[str]:
    """Return the labels of the arm's final checkpoints, one per seed."""
    return [f"{arm.name}@{seed}/{arm.last_stage}" for seed in job.study.seeds]


def compare(job: Job, folder: Path) -> dict[str, Any]:
    """Return means over seeds with 95 % intervals, and differences seed by seed.

    {"arms": {"pear": {"before RL": {"pass@1": {"value": 0.24, "low": ...}, ...}, ...}, ...},
     "differences": [{"arm": "pear", "baseline": "sft", "when": "after RL",
                      "metric": "pass@1", "value": 0.02, "by_seed": [...], ...}, ...],
     "reversals": [{"better_before": "sft", "better_after": "pear"}], ...}
    """
    cards = json.loads((folder / "evaluate" / "scorecard.json").read_text())["checkpoints"]
    baseline, ks = baseline_of(job), job.evaluation.ks
    scores: dict[tuple[str, str, int], np.ndarray] = {}
    for arm in job.study_arms:
        ends = labels(job, arm)
        starts = [start_of(label, cards) for label in ends]
        for when, checkpoints in ((BEFORE, starts), (AFTER, ends)):
            for k in ks:
                values = [cards[label]["pass_at_k"][str(k)]["value"] for label in checkpoints]
                scores[arm.name, when, k] = np.array(values)
    arms = {
        arm.name: {when: {f"pass@{k}": over_seeds(scores[arm.name, when, k]) for k in ks} for when in WHEN}
        | {"seconds": mean_seconds(job, folder, arm)}
        for arm in job.study_arms
    }
    differences = [
        {"arm": name, "baseline": baseline, "when": when, "metric": f"pass@{k}"}
        | over_seeds(values - scores[baseline, when, k])
        for (name, when, k), values in scores.items()
        if name != baseline
    ]
    before, after = (np.array([scores[name, when, min(ks)].mean() for name in arms]) for when in WHEN)
    reversals = [
        {"better_before": name, "better_after": other}
        for (i, name), (j, other) in permutations(enumerate(arms), 2)
        if before[i] > before[j] and after[i] < after[j]
    ]
    primary = AFTER, f"pass@{min(ks)}"
    return {
        "seeds": list(job.study.seeds),
        "baseline": baseline,
        "arms": arms,
        "differences": differences,
        "primary": [row for row in differences if (row["when"], row["metric"]) == primary],
        "spearman": predictors.spearman(before, after),
        "reversals": reversals,
    }


def over_seeds(values: np.ndarray) -> dict[str, Any]:
    """Return mean, standard error and 95 % interval over seeds, and the values by seed."""
    return {**mean_over_seeds(values), "by_seed": values.tolist()}


def mean_seconds(job: Job, folder: Path, arm: Arm) -> dict[str, float]:
    """Return the mean seconds of SFT and of the last stage, interrupted attempts included."""
    folders = [job.homes(folder)[f"{arm.name}@{seed}"] for seed in job.study.seeds]
    manifests = [json.loads((home / "manifest.json").read_text())["stages"] for home in folders]
    seconds = {}
    for stage in ("sft", arm.last_stage):
        entries = [stages.get(stage, {}) for stages in manifests]
        seconds[stage] = float(np.mean([e.get("seconds", 0.0) + e.get("seconds_before", 0.0) for e in entries]))
    return seconds


def spreadsheet(found: dict[str, Any]) -> str:
    """Return one row per arm, point in time and metric."""
    file = io.StringIO()
    columns = ["arm", "when", "metric", "value", "standard_error", "low", "high"]
    seeds = [f"seed {seed}" for seed in found["seeds"]]
    writer = csv.DictWriter(file, columns + seeds, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for (name, arm), when in product(found["arms"].items(), WHEN):
        for metric, score in arm[when].items():
            row = {"arm": name, "when": when, "metric": metric} | score
            writer.writerow(row | dict(zip(seeds, score["by_seed"], strict=True)))
    return file.getvalue()
