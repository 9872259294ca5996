"""Stage `pretrain`: train the small models that a job asks for, the student and the authors of its corpus. Models named
by folder or hub name need none of this."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ray

from pear_ray.config import Job, Pretrain, TaskSpec
from pear_ray.errors import require
from pear_ray.run import RunDir, connect
from pear_ray.tasks import Demonstrator, make_tasks

log = logging.getLogger(__name__)


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Train every missing model in a Ray task with one CPU; return each one's final loss.

    Raises:
        ConfigError: the job's first task cannot write demonstrations.
        TimeoutError: no model was finished within the longest `timeout_seconds`.
    """
    connect()
    sources = {"base": job.model, **job.behavior}
    models = {name: source.pretrain for name, source in sources.items() if source.pretrain}
    fits = not models or isinstance(make_tasks(job.tasks)[0], Demonstrator)
    expected = "a task that writes demonstrations, for the models with `pretrain`"
    require(fits, "tasks.0", expected, repr(job.tasks[0].name))
    folder = run.folder / "pretrain"
    folder.mkdir(exist_ok=True)
    losses: dict[str, Any] = {}
    # Parents first; Ray starts a child once its parent's loss is there.
    for name, settings in sorted(models.items(), key=lambda item: item[1].start_from is not None):
        if not (folder / name / "config.json").exists():
            parent_loss = losses.get(settings.start_from or "")
            losses[name] = train_model.remote(folder / name, settings, job.tasks[0], parent_loss)
    results: dict[str, Any] = {}
    names = {loss: name for name, loss in losses.items()}
    pending = list(names)
    timeout = max((models[name].timeout_seconds for name in losses), default=0.0)
    while pending:
        done, pending = ray.wait(pending, timeout=timeout)
        if not done:
            late = ", ".join(names[loss] for loss in pending)
            raise TimeoutError(
                f"pretrain: timeout_seconds: expected a model within {timeout:.0f} s, still training {late}"
            )
        name, loss = names[done[0]], ray.get(done[0])
        results[name] = {"final_loss": round(loss, 4)}
        log.info("pretrain: %s done, loss %.3f nats per token", name, loss)
    return results


@ray.remote(num_cpus=1)
def train_model(folder: Path, settings: Pretrain, spec: TaskSpec, parent_loss: float | None) -> float:
    """Train one model in its own process; `parent_loss` makes Ray wait for the parent."""
    from pear_ray.train.new_model import pretrain_model

    task = make_tasks([spec])[0]
    assert isinstance(task, Demonstrator)
    return pretrain_model(folder, settings, task, num_threads=1)
