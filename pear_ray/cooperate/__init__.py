"""Learning from rollouts and from offline traces at once, in place of `rl`.

Rollouts come, and weights go, as in `rl`; traces are read and weighted as in `sft`. What a step
does with both is the method: one loss of both, an optimizer step on each in turn, BRIDGE, or TRAPO,
whose rollouts go on from the beginnings of traces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from pear_ray.config import Job
from pear_ray.cooperate.bridge import AdapterStep, BridgeStep
from pear_ray.cooperate.demonstrations import DemonstrationIndex
from pear_ray.cooperate.failed_prompts import FailedPromptScheduler
from pear_ray.cooperate.methods import AlternateStep, SumStep, TrapoStep, TwoSignalStep
from pear_ray.cooperate.mixed_data import MixedDataScheduler
from pear_ray.cooperate.prefix import PrefixScheduler
from pear_ray.cooperate.settings import settings_of, traces_job
from pear_ray.data.scored_dataset import RowGroup, refuse_too_few, row_filter, scan
from pear_ray.rl import loop
from pear_ray.rl.learners import learn
from pear_ray.rl.scheduler import RolloutScheduler
from pear_ray.rl.stage import rollout_stage
from pear_ray.run import RunDir
from pear_ray.weights.adapters import MergedCache

METHODS: dict[tuple[str, bool], type[TwoSignalStep]] = {
    ("sum", True): SumStep,
    ("alternate", True): AlternateStep,
    ("bridge", True): BridgeStep,
    ("bridge", False): AdapterStep,
    ("trapo", True): TrapoStep,
}


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Look through the corpus, then learn from both.

    Raises:
        ConfigError: the corpus cannot be used, or has too few rows for a step.
    """
    settings, shown = settings_of(job), traces_job(job)
    groups = scan(shown.scored_folder, row_filter(shown))
    refuse_too_few(shown, groups)
    stage = rollout_stage(job, run, "cooperate", course_of(job, groups))
    if settings.method == "bridge":
        stage = replace(stage, replica=MergedCache)
    method = METHODS[settings.method, settings.meta_objective]
    return loop.run(stage, partial(learn, method), {"groups": groups})


def course_of(job: Job, groups: list[RowGroup]) -> Callable[[Job, str, int, int], RolloutScheduler]:
    """Which problems are asked and how, and which traces a step learns from."""
    settings, shown = settings_of(job), traces_job(job)
    if settings.method == "trapo":
        return partial(PrefixScheduler, DemonstrationIndex(groups, row_filter(shown)))
    if settings.traces == "failed":
        return partial(FailedPromptScheduler, DemonstrationIndex(groups, row_filter(shown)))
    return partial(MixedDataScheduler, shown, groups)
