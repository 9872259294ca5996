"""Everything in order: models, corpus, scores, then `sft` and `rl` or `cooperate` for each arm,
evaluation of all checkpoints together, and the report."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from pear_ray.config import Job
from pear_ray.run import RunDir, open_run


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Perform every stage that is not done yet."""
    prepare(job, run)
    if not job.arms:
        for name in ("sft", job.last_stage_of("")):
            run.run_stage(name, stage(name))
    for arm in job.arms:
        with open_run(job.of_arm(arm)) as own:
            for name in arm.stages:
                own.run_stage(name, stage(name))
    run.run_stage("evaluate", stage("evaluate"))
    run.run_stage("rank", stage("rank"))
    run.run_stage("report", stage("report"))
    return {"arms": [arm.name for arm in job.arms]}


def prepare(job: Job, run: RunDir) -> None:
    """What all arms have in common: models and scored corpus."""
    if job.model.pretrain or any(origin.pretrain for origin in job.behavior.values()):
        run.run_stage("pretrain", stage("pretrain"))
    if job.corpus.sample:
        run.run_stage("sample", stage("sample"))
    if not job.corpus.scored_path:
        run.run_stage("score", stage("score"))


def stage(name: str) -> Callable[[Job, RunDir], dict[str, Any]]:
    """A stage by name. Its module, and the engines behind it, are imported only if it is run."""

    def function(job: Job, run: RunDir) -> dict[str, Any]:
        return importlib.import_module(f"pear_ray.{name}").run(job, run)

    return function
