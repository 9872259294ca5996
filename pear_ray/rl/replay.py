"""Learn again from recorded rollouts: learners alone, without engines."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

from pear_ray.errors import ConfigError
from pear_ray.rl.recording import file_of, read
from pear_ray.rl.rollouts import LOOK_SECONDS, BatchSender, RolloutBatch, first_announced
from pear_ray.rl.scheduler import batch_metrics
from pear_ray.rl.stage import RolloutStage

STEPS_AHEAD = 64


def replay(stage: RolloutStage, versions_actor: Any, queue: Any, ended: Event) -> None:
    """Hand over what was recorded, step after step, a few ahead of the learners.

    Raises:
        ConfigError: a step was not recorded.
    """
    job = stage.job
    assert job.rl.replay is not None
    folder = Path(job.rl.replay)
    news = first_announced(versions_actor, job.learner.timeout_seconds, ended)
    if news is None:
        return
    handover, step = BatchSender(queue), news.versions[-1].version
    for number in range(step, job.rl.steps):
        if not file_of(folder, number).exists():
            raise ConfigError(
                f"rl.replay: {file_of(folder, number)} is missing; expected every step"
            )
    while not ended.is_set():
        if step < job.rl.steps and step <= handover.newest_taken + STEPS_AHEAD:
            batch = read(folder, step)
            answers = [answer for group in batch.groups for answer in group.completions]
            if job.rl.kl_coefficient and any(a.reference_logprobs is None for a in answers):
                raise ConfigError(
                    f"rl.replay: {file_of(folder, step)} was recorded without rl.kl_coefficient;"
                    f" read {job.rl.kl_coefficient}, expected 0"
                )
            handover.put(RolloutBatch(batch, (), (), {}, batch_metrics(batch)))
            step += 1
            continue
        ended.wait(LOOK_SECONDS)
        handover.look_after()
