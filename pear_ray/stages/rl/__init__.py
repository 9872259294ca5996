"""Reinforcement learning on verified answers.

Learners (DeepSpeed ZeRO-3 under Ray Train) and generators (vLLM actors) meet at two small actors:
the board, which knows the newest weights, and the queue, which holds finished rollouts.

    generators                                board                     learners
      serve the newest weights             <--- announce ---  publish own partitions
      answer problems, have them judged                            take the step's rollouts
      rollouts of the step ----------------->  queue  ----------->  one optimiser step on them

How far the two sides may be apart is one number. With max_staleness = 0 they alternate and every
token is on-policy; with k > 0 the same two loops overlap, and answers that are under way when new
weights come go on under them.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Event
from typing import Any

import ray

from pear_ray.actors.board import GRACE_SECONDS, Board, StepQueue
from pear_ray.actors.cluster import connect, here
from pear_ray.actors.training import train
from pear_ray.config import Job
from pear_ray.engines.suitable import refuse_unsuitable
from pear_ray.manifest import Run
from pear_ray.stages.rl.learners import learn
from pear_ray.stages.rl.replay import replay
from pear_ray.stages.rl.rollouts import LOOK_SECONDS, roll_out

# Board and queue are started again where they die, and calls to them are repeated.
LASTING = {"max_restarts": -1, "max_task_retries": -1}


def run(job: Job, run: Run) -> dict[str, Any]:
    """Start both sides, and end the one when the other ends."""
    export = run.folder / "sft" / "export"
    start = str(export if export.exists() else job.model_path())
    refuse_unsuitable(job, start)
    connect()
    options = LASTING | {"scheduling_strategy": here()}
    board = Board.options(**options).remote()  # type: ignore[attr-defined]
    queue = StepQueue.options(**options).remote()  # type: ignore[attr-defined]
    config = {
        "job": job.model_dump(),
        "folder": str(run.folder),
        "start": start,
        "board": board,
        "queue": queue,
    }
    ended = Event()
    bring = roll_out if job.rl.replay is None else replay
    with ThreadPoolExecutor(1) as executor:
        rollouts: Future[None] = executor.submit(
            bring_or_say_why, bring, job, run, start, board, queue, ended
        )
        try:
            facts = train(
                learn,
                config,
                job.learner,
                job.placement.learners,
                run.folder / "rl" / f"{run.folder.name}-rl",
            )
        finally:
            ended.set()
            with suppress(ray.exceptions.RayError):
                ray.get(board.close.remote("the learners have ended"), timeout=GRACE_SECONDS)
    if "rollouts_ended" in facts:
        rollouts.result()
    return facts


def bring_or_say_why(
    bring: Any, job: Job, run: Run, start: str, board: Any, queue: Any, ended: Event
) -> None:
    """Bring rollouts; where that fails, learners that wait for them hear why."""
    try:
        bring(job, run, start, board, queue, ended)
    except BaseException as error:
        # Again and again: a queue that dies has forgotten it.
        while not ended.is_set():
            ray.get(queue.close.remote(f"the rollouts failed: {error!r}"), timeout=GRACE_SECONDS)
            ended.wait(LOOK_SECONDS)
        raise
