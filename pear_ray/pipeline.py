"""Stage `pipeline`: everything in order. `arms` train one after another on one scored corpus.

pretrain -> sample -> score -> (sft -> rl | cooperate) per arm -> evaluate -> rank -> report
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from pear_ray.config import Job
from pear_ray.run import RunDir, open_run


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Run every stage that is not done yet."""
    prepare(job, run)
    if not job.arms:
        for name in ("sft", job.last_stage_of("")):
            run.run_stage(name, load_stage(name))
    for arm in job.arms:
        with open_run(job.of_arm(arm)) as arm_run:
            for name in arm.stages:
                arm_run.run_stage(name, load_stage(name))
    for name in ("evaluate", "rank", "report"):
        run.run_stage(name, load_stage(name))
    return {"arms": [arm.name for arm in job.arms]}


def prepare(job: Job, run: RunDir) -> None:
    """Make what all arms share: models and scored corpus."""
    if job.model.pretrain or any(source.pretrain for source in job.behavior.values()):
        run.run_stage("pretrain", load_stage("pretrain"))
    if job.corpus.sample:
        run.run_stage("sample", load_stage("sample"))
    if not job.corpus.scored_path:
        run.run_stage("score", load_stage("score"))


def load_stage(name: str) -> Callable[[Job, RunDir], dict[str, Any]]:
    """Return a stage that imports its module, and the engines behind it, only when it runs."""
    return lambda job, run: importlib.import_module(f"pear_ray.{name}").run(job, run)
