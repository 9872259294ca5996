"""Was it worth it? Every arm goes through its stages with several seeds, on one scored corpus and
from one base; all are evaluated on the same problems, and arms are compared seed by seed.

What is expected is written down before anything runs. Killed, the same command goes on where it
was; with more arms or seeds, the study grows.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from pathlib import Path
from typing import Any

import ray

from pear_ray import pipeline
from pear_ray.config import Arm, Job
from pear_ray.errors import ConfigError
from pear_ray.logs import configure_logging
from pear_ray.ray_cluster import connect
from pear_ray.run import RunDir, open_run, write_json
from pear_ray.study.comparison import comparison, spreadsheet

log = logging.getLogger(__name__)

# Whoever dies with its node is begun again elsewhere, and goes on where it was.
MAX_RETRIES = 3
# Longest time between two looks at what runs, in seconds.
LOOK_SECONDS = 10.0


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Run everything in order; the cells of the study side by side up to `study.max_parallel`.

    Raises:
        ConfigError: there is nothing to compare.
    """
    if len(job.study_arms) < 2:
        raise ConfigError(
            f"arms: read {len(job.study_arms)}; expected at least two arms to compare"
        )
    if len(job.study.seeds) < 2:
        raise ConfigError(f"study.seeds: read {list(job.study.seeds)}; expected at least two seeds")
    plan = noted_plan(job, run.folder / "study" / "plan.json")
    pipeline.prepare(job, run)
    run_cells(job)
    if run.is_done("evaluate") and not is_evaluated(job, run.folder):
        run.forget("evaluate")
    run.run_stage("evaluate", pipeline.stage("evaluate"))
    run.run_stage("rank", pipeline.stage("rank"))
    found = comparison(job, run.folder) | {"plan": plan}
    (run.folder / "study" / "study.csv").write_text(spreadsheet(found))
    write_json(run.folder / "study" / "study.json", found)
    run.run_stage("report", pipeline.stage("report"))
    return {"primary": found["primary"]}


def plan_of(job: Job) -> dict[str, Any]:
    """What the study will do and what is expected of it."""
    return {
        "hypothesis": job.study.hypothesis,
        "primary": f"pass@{min(job.evaluation.ks)} after RL, paired over seeds",
        "baseline": job.study.baseline or job.study_arms[0].name,
        "arms": {arm.name: settings_of(arm) for arm in job.study_arms},
        "seeds": list(job.study.seeds),
    }


def settings_of(arm: Arm) -> dict[str, Any]:
    """What the arm sets differently, by stage."""
    own = {"sft": arm.sft, "rl": arm.rl}
    return own if arm.cooperate is None else own | {"cooperate": arm.cooperate}


def noted_plan(job: Job, path: Path) -> dict[str, Any]:
    """The plan as it was noted before anything ran. A study that has grown since by arms or seeds
    keeps the plans it had, oldest first, under `earlier`."""
    plan = json.loads(json.dumps(plan_of(job)))
    earlier: list[dict[str, Any]] = []
    if path.exists():
        noted = json.loads(path.read_text())
        earlier = noted.pop("earlier", [])
        if noted != plan:
            earlier.append(noted)
    plan["earlier"] = earlier
    path.parent.mkdir(exist_ok=True)
    write_json(path, plan)
    return plan


def is_evaluated(job: Job, folder: Path) -> bool:
    """Whether the scorecard knows what became of every arm with every seed."""
    known = json.loads((folder / "evaluate" / "scorecard.json").read_text())["checkpoints"]
    arms, seeds = job.study_arms, job.study.seeds
    names = [f"{arm.name}@{seed}/{arm.last_stage}" for arm in arms for seed in seeds]
    return set(names) <= set(known)


def run_cells(job: Job) -> None:
    """Take every arm through its stages with every seed.

    Raises:
        RayTaskError: one of them failed; those that ran beside it are cut off, and go on where they
            were when the stage is run again.
    """
    connect()
    waiting = deque((arm, seed) for seed in job.study.seeds for arm in job.study_arms)
    working: dict[Any, str] = {}
    while waiting or working:
        while waiting and len(working) < job.study.max_parallel:
            arm, seed = waiting.popleft()
            own = job.of_arm(arm, seed)
            working[cell.remote(own.model_dump(), arm.stages)] = f"{arm.name}@{seed}"
        ready, _ = ray.wait(list(working), num_returns=1, timeout=LOOK_SECONDS)
        for done in ready:
            name = working.pop(done)
            ray.get(done)
            log.info("study: %s done, %d to go", name, len(waiting) + len(working))


@ray.remote(num_cpus=0, max_retries=MAX_RETRIES)
def cell(document: dict[str, Any], stages: tuple[str, ...]) -> None:
    """One arm with one seed, in a process of its own somewhere on the cluster."""
    job = Job(**document)
    configure_logging(job.tracking.logs)
    with open_run(job) as own:
        for stage in stages:
            own.run_stage(stage, pipeline.stage(stage))
