"""Learning from rollouts and from offline traces at once, in place of `rl`.

Rollouts come, and weights go, as in `rl`; traces are read and weighted as in `sft`. What a step
does with both is the method: one loss of both, an optimiser step on each in turn, BRIDGE, or TRAPO,
whose rollouts go on from the beginnings of traces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from pear_ray.config import Job
from pear_ray.cooperate.bridge import Bridge, WithAdapters
from pear_ray.cooperate.demonstrations import Traces
from pear_ray.cooperate.failed_prompts import FailingCourse
from pear_ray.cooperate.methods import Alternate, BothSignals, Sum, Trapo
from pear_ray.cooperate.mixed_data import ReadingCourse
from pear_ray.cooperate.prefix import GuidedCourse
from pear_ray.cooperate.settings import settings_of, traces_job
from pear_ray.data.scored_dataset import RowGroup, refuse_too_few, survey, wanted_of
from pear_ray.rl import loop
from pear_ray.rl.learners import learn
from pear_ray.rl.scheduler import Course
from pear_ray.rl.stage import stage_of
from pear_ray.run import Run
from pear_ray.weights.adapters import JoinedReplica

METHODS: dict[tuple[str, bool], type[BothSignals]] = {
    ("sum", True): Sum,
    ("alternate", True): Alternate,
    ("bridge", True): Bridge,
    ("bridge", False): WithAdapters,
    ("trapo", True): Trapo,
}


def run(job: Job, run: Run) -> dict[str, Any]:
    """Look through the corpus, then learn from both.

    Raises:
        BadInput: the corpus cannot be used, or has too few rows for a step.
    """
    settings, shown = settings_of(job), traces_job(job)
    groups = survey(shown.scored_folder, wanted_of(shown))
    refuse_too_few(shown, groups)
    stage = stage_of(job, run, "cooperate", course_of(job, groups))
    if settings.method == "bridge":
        stage = replace(stage, replica=JoinedReplica)
    method = METHODS[settings.method, settings.meta_objective]
    return loop.run(stage, partial(learn, method), {"groups": groups})


def course_of(job: Job, groups: list[RowGroup]) -> Callable[[Job, str, int, int], Course]:
    """Which problems are asked and how, and which traces a step learns from."""
    settings, shown = settings_of(job), traces_job(job)
    if settings.method == "trapo":
        return partial(GuidedCourse, Traces(groups, wanted_of(shown)))
    if settings.traces == "failed":
        return partial(FailingCourse, Traces(groups, wanted_of(shown)))
    return partial(ReadingCourse, shown, groups)
