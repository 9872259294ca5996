"""What the stages that learn from rollouts have in common.

Learners (DeepSpeed ZeRO-3 under Ray Train) and generators (vLLM actors) meet at two small actors:
the board, which knows the newest weights, and the queue, which holds finished rollouts.

    generators                                board                     learners
      serve the newest weights             <--- announce ---  publish own partitions
      answer problems, have them judged                            take the step's rollouts
      rollouts of the step ----------------->  queue  ----------->  what the stage does with them

How far the two sides may be apart is one number. With max_staleness = 0 they alternate and every
token is on-policy; with k > 0 the same two loops overlap, and answers that are under way when new
weights come go on under them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Event
from typing import Any

import ray

from pear_ray.data.batch_queue import GRACE_SECONDS, BatchQueue
from pear_ray.ray_cluster import connect, here
from pear_ray.rl.replay import replay
from pear_ray.rl.rollouts import LOOK_SECONDS, run_rollouts
from pear_ray.rl.stage import RolloutStage
from pear_ray.train.ray_train import train
from pear_ray.train.supported import check_supported
from pear_ray.weights.registry import PolicyVersions

# Board and queue are started again where they die, and calls to them are repeated.
RESTARTABLE = {"max_restarts": -1, "max_task_retries": -1}


def run(
    stage: RolloutStage,
    learn: Callable[[dict[str, Any]], Any],
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Start both sides, and end the one when the other ends. Ranks run `learn(config)`, of which
    `more` is a part."""
    job, folder = stage.job, stage.run.folder
    check_supported(job, stage.start)
    connect()
    options = RESTARTABLE | {"scheduling_strategy": here()}
    versions_actor = PolicyVersions.options(**options).remote()  # type: ignore[attr-defined]
    queue = BatchQueue.options(**options).remote()  # type: ignore[attr-defined]
    config = {
        "job": job.model_dump(),
        "folder": str(folder),
        "stage": stage.name,
        "start": stage.start,
        "board": versions_actor,
        "queue": queue,
        **(more or {}),
    }
    ended = Event()
    bring = run_rollouts if job.rl.replay is None else replay
    with ThreadPoolExecutor(1) as executor:
        rollouts: Future[None] = executor.submit(
            bring_or_say_why, bring, stage, versions_actor, queue, ended
        )
        try:
            storage = folder / stage.name / f"{folder.name}-{stage.name}"
            facts = train(learn, config, job.learner, job.placement.learners, storage)
        finally:
            ended.set()
            with suppress(ray.exceptions.RayError):
                ray.get(
                    versions_actor.close.remote("the learners have ended"), timeout=GRACE_SECONDS
                )
    if "rollouts_ended" in facts:
        rollouts.result()
    return facts


def bring_or_say_why(
    bring: Any, stage: RolloutStage, versions_actor: Any, queue: Any, ended: Event
) -> None:
    """Bring rollouts; where that fails, learners that wait for them hear why."""
    try:
        bring(stage, versions_actor, queue, ended)
    except BaseException as error:
        # Again and again: a queue that dies has forgotten it.
        while not ended.is_set():
            ray.get(queue.close.remote(f"the rollouts failed: {error!r}"), timeout=GRACE_SECONDS)
            ended.wait(LOOK_SECONDS)
        raise
