"""Make the models that the job wants made: the student, and the authors of its corpus.

Jobs that name models by folder or hub name have nothing to do here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ray

from pear_ray.config import Job, Pretrain, TaskSpec
from pear_ray.errors import ConfigError
from pear_ray.ray_cluster import connect
from pear_ray.run import RunDir
from pear_ray.tasks import Demonstrator, make_tasks

log = logging.getLogger(__name__)


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Train each model in a Ray task of one CPU; one that exists is kept."""
    connect()
    origins = {"base": job.model, **job.behavior}
    wanted = {name: origin.pretrain for name, origin in origins.items() if origin.pretrain}
    if wanted and not isinstance(make_tasks(job.tasks)[0], Demonstrator):
        raise ConfigError(
            f"tasks.0: {job.tasks[0].name!r} cannot write demonstrations;"
            " expected a task that can, for the models with `pretrain`"
        )
    folder = run.folder / "pretrain"
    folder.mkdir(exist_ok=True)
    calls: dict[str, Any] = {}
    # Those that others begin with are asked for first; Ray makes the others wait for them.
    for name, settings in sorted(wanted.items(), key=lambda item: item[1].start_from is not None):
        if not (folder / name / "config.json").exists():
            parent = calls.get(settings.start_from or "")
            calls[name] = make_model.remote(folder / name, settings, job.tasks[0], parent)
    facts: dict[str, Any] = {}
    names = {call: name for name, call in calls.items()}
    waiting = list(names)
    deadline = max((wanted[name].timeout_seconds for name in calls), default=0.0)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=deadline)
        if not done:
            late = ", ".join(names[call] for call in waiting)
            raise TimeoutError(f"pretrain: waited {deadline:.0f} s (timeout_seconds) for {late}")
        loss = ray.get(done[0])
        facts[names[done[0]]] = {"final_loss": round(loss, 4)}
        log.info("pretrain: %s made, loss %.3f nats per token", names[done[0]], loss)
    return facts


@ray.remote(num_cpus=1)
def make_model(
    folder: Path, settings: Pretrain, spec: TaskSpec, parent_loss: float | None
) -> float:
    """One model, in a process of its own, once the model that it begins with is there."""
    from pear_ray.train.new_model import pretrain

    task = make_tasks([spec])[0]
    assert isinstance(task, Demonstrator)
    return pretrain(folder, settings, task, num_threads=1)
