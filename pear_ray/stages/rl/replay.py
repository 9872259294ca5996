"""Learn again from recorded rollouts: learners alone, without engines."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

from pear_ray.actors.course import lesson_numbers
from pear_ray.config import Job
from pear_ray.manifest import Run
from pear_ray.stages.rl.recording import read
from pear_ray.stages.rl.rollouts import LOOK_SECONDS, Handover, Rollouts, first_announced

STEPS_AHEAD = 64


def replay(job: Job, run: Run, start: str, board: Any, queue: Any, ended: Event) -> None:
    """Hand over what was recorded, step after step, a few ahead of the learners.

    Raises:
        BadInput: a step was not recorded.
    """
    assert job.rl.replay is not None
    folder = Path(job.rl.replay)
    news = first_announced(board, job.learner.deadline_seconds, ended)
    if news is None:
        return
    handover, step = Handover(queue), news.versions[-1].version
    while not ended.is_set():
        if step < job.rl.steps and step <= handover.newest_taken + STEPS_AHEAD:
            lesson = read(folder, step)
            handover.put(Rollouts(lesson, (), (), {}, lesson_numbers(lesson)))
            step += 1
            continue
        ended.wait(LOOK_SECONDS)
        handover.look_after()
