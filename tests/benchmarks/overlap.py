"""Speed-up of sampling one step ahead, if engines and learners cost the same and share no cores.

    python tests/benchmarks/overlap.py [--seconds 2] [--steps 12]

The loop is the stage's own (`rl.rollout_loop`) with its engine pool, reward pool, queue and registry; engines complete
a step's prompts in `--seconds` and learners train on them in the same time, both by sleeping. Prints for
`rl.max_staleness` 0 and 1 the median seconds per step, and the fraction in which learners wait.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from control import job_of, running

from pear_ray.data.batch_queue import take_batch
from pear_ray.weights.registry import RankShard

ENGINES, GROUPS_PER_SECOND = 8, 16
DEADLINE_SECONDS = 120.0
WARM_UP = 3


@ray.remote(num_cpus=0)
def learn(registry: Any, queue: Any, num_steps: int, seconds: float) -> list[tuple[float, float]]:
    """Learners that take so long for a step: of each, the seconds of waiting and of all of it."""
    ray.get(registry.announce.remote(RankShard(0, 0, (), 0), 1, 0, "only"))
    found = []
    for step in range(num_steps):
        began = time.perf_counter()
        batch = take_batch(queue, step, DEADLINE_SECONDS).batch
        taken = time.perf_counter()
        time.sleep(seconds)
        share = RankShard(step + 1, 0, (), 0)
        ray.get(registry.announce.remote(share, 1, batch.next_problem, "only"))
        found.append((taken - began, time.perf_counter() - began))
    return found[WARM_UP:]


def measured(staleness: int, words: argparse.Namespace) -> list[tuple[float, float]]:
    """Steps of one run."""
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(Path(folder), ENGINES, GROUPS_PER_SECOND)
        job = job.model_copy(update={"rl": job.rl.model_copy(update={"max_staleness": staleness})})
        with running(job, 1, words.seconds) as (registry, queue, _):
            steps = ray.get(learn.remote(registry, queue, words.steps, words.seconds), timeout=600)
    return steps


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of either side, for a step")
    parser.add_argument("--steps", type=int, default=12)
    words = parser.parse_args()
    logging.getLogger("pear_ray").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    seconds = []
    for staleness in (0, 1):
        steps = measured(staleness, words)
        seconds.append(statistics.median(step for _, step in steps))
        waits = statistics.median(wait / step for wait, step in steps)
        print(f"max_staleness {staleness}: {seconds[-1]:.2f} s a step, learners wait {waits:.2f}")
    print(f"{seconds[0] / seconds[1]:.2f} times as many steps one ahead")
    ray.shutdown()


if __name__ == "__main__":
    main()
