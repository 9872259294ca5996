"""Make the models that the job wants made: the student, and the authors of its corpus.

Jobs that name models by folder or hub name have nothing to do here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ray

from pear_ray.actors.cluster import connect
from pear_ray.config import BadInput, Job, Pretrain, TaskSpec
from pear_ray.manifest import Run
from pear_ray.tasks import make_tasks
from pear_ray.tasks.task import Demonstrator

log = logging.getLogger(__name__)


def run(job: Job, run: Run) -> dict[str, Any]:
    """Train each model in a Ray task of one CPU; one that exists is kept."""
    connect()
    origins = {"base": job.model, **job.behaviour}
    wanted = {name: origin.pretrain for name, origin in origins.items() if origin.pretrain}
    if wanted and not isinstance(make_tasks(job.tasks)[0], Demonstrator):
        raise BadInput(
            f"tasks.0: {job.tasks[0].name!r} cannot write demonstrations;"
            " expected a task that can, for the models with `pretrain`"
        )
    folder = run.folder / "pretrain"
    folder.mkdir(exist_ok=True)
    calls = {
        make_model.remote(folder / name, settings, job.tasks[0]): name
        for name, settings in wanted.items()
        if not (folder / name / "config.json").exists()
    }
    facts: dict[str, Any] = {}
    waiting = list(calls)
    while waiting:
        done, waiting = ray.wait(waiting)
        loss = ray.get(done[0])
        facts[calls[done[0]]] = {"final_loss": round(loss, 4)}
        log.info("pretrain: %s made, loss %.3f nats per token", calls[done[0]], loss)
    return facts


@ray.remote(num_cpus=1)
def make_model(folder: Path, settings: Pretrain, spec: TaskSpec) -> float:
    """One model, in a process of its own."""
    from pear_ray.engines.pretrain import pretrain

    task = make_tasks([spec])[0]
    assert isinstance(task, Demonstrator)
    return pretrain(folder, settings, task, num_threads=1)
