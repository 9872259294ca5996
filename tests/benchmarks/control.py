"""The control plane of RL alone, with simulated engines and learners: scheduler, grading, queue and registry.

    python tests/benchmarks/control.py [--engines 256] [--groups-per-second 1000] [--seconds 30]

The loop is the stage's own (`rl.rollout_loop`) with its engine pool, reward pool, queue and registry. Engines are
simulated, many per process: each completes a group after a fixed time. Learners are simulated too: they take a batch
whenever one is due, and announce a version without weights. Prints groups per second; CPU seconds per second of the
loop's process, of queue and registry, and of the reward workers; and the memory that the loop's process gained since
the fifth step.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray

from pear_ray.config import Job, Pretrain
from pear_ray.data.batch_queue import BatchQueue, take_batch
from pear_ray.engines.engine_actor import PollResult, WeightUpdateResult
from pear_ray.engines.engine_pool import EnginePool
from pear_ray.engines.generator import SampleRequest
from pear_ray.records import Completion
from pear_ray.rewards.pool import RewardPool
from pear_ray.rl import rollout_loop
from pear_ray.rl.rollouts import Link, RolloutStage, Workers
from pear_ray.run import RunDir
from pear_ray.tasks import make_tasks
from pear_ray.train.new_model import write_new_model
from pear_ray.weights.registry import PolicyVersions, RankShard

LATENCY_SECONDS = 2.0
TOKENS_PER_ANSWER = 16
GROUP_SIZE = 8
SECONDS_PER_STEP = 2
WARM_UP_STEPS = 5
NUM_DIFFERENT = 64
HOSTS = 2


def answers_of(version: int, draw: random.Random) -> tuple[Completion, ...]:
    """A group of answers."""
    return tuple(
        Completion(
            tuple(draw.randrange(100) for _ in range(TOKENS_PER_ANSWER)),
            tuple(-draw.random() for _ in range(TOKENS_PER_ANSWER)),
            "build 1 + 2 = 3 , 3 + 4 = 7",
            "stop",
            ((version, TOKENS_PER_ANSWER),),
        )
        for _ in range(GROUP_SIZE)
    )


@ray.remote(num_cpus=0)
class Host:
    """Many pretended engines in one process."""

    def __init__(self, latency_seconds: float) -> None:
        self._latency_seconds = latency_seconds
        self._finished: dict[str, list[tuple[str, Any]]] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._version: dict[str, int] = {}
        self._made: dict[int, list[tuple[Completion, ...]]] = {}

    async def ready(self, name: str) -> str:
        self._finished[name], self._news[name] = [], asyncio.Event()
        return ray.get_runtime_context().get_node_id()

    async def submit(self, name: str, work: list[tuple[str, SampleRequest]]) -> None:
        asyncio.get_running_loop().call_later(self._latency_seconds, self._finish, name, work)

    def _finish(self, name: str, work: list[tuple[str, SampleRequest]]) -> None:
        version = self._version.get(name, 0)
        for key, request in work:
            written_by = max(version, request.min_version)
            self._finished[name].append((key, self._answers(written_by, request)))
        self._news[name].set()

    def _answers(self, version: int, request: SampleRequest) -> tuple[Completion, ...]:
        """Answers made beforehand, some for each version: an engine's work is not measured."""
        if version not in self._made:
            draw = random.Random(version)
            # Engines of one process are a version or two apart while a new one spreads.
            self._made = {old: made for old, made in self._made.items() if old > version - 4}
            self._made[version] = [answers_of(version, draw) for _ in range(NUM_DIFFERENT)]
        return self._made[version][request.seed % NUM_DIFFERENT]

    async def poll(self, name: str, wait_seconds: float) -> PollResult:
        try:
            await asyncio.wait_for(self._news[name].wait(), wait_seconds)
        except TimeoutError:
            return PollResult([], 0.0)
        self._news[name].clear()
        found, self._finished[name] = self._finished[name], []
        return PollResult(found, 0.0)

    async def update_weights(self, name: str, versions: Any, probe: Any, seconds: float) -> WeightUpdateResult:
        self._version[name] = versions[-1].version
        return WeightUpdateResult(versions[-1].version, 0.0, 0.0, 0.0, ())


class RemoteMethod:
    """A method of one pretended engine."""

    def __init__(self, method: Any, name: str) -> None:
        self._method, self._name = method, name

    def remote(self, *arguments: Any) -> Any:
        return self._method.remote(self._name, *arguments)


class SimulatedEngine:
    """The engine actor as the pool sees it."""

    def __init__(self, host: Any, name: str) -> None:
        for method in ("ready", "submit", "poll", "update_weights"):
            setattr(self, method, RemoteMethod(getattr(host, method), name))


class SimulatedPool(EnginePool):
    """Simulated engines, spread over a few processes; they end with their hosts."""

    def __init__(self, job: Job, num_hosts: int, latency_seconds: float) -> None:
        host = Host.options(max_concurrency=10_000)  # type: ignore[attr-defined]
        self._hosts = [host.remote(latency_seconds) for _ in range(num_hosts)]
        super().__init__(job, "", print)

    def __exit__(self, *error: object) -> None:
        pass

    def _start_actor(self) -> SimulatedEngine:
        return SimulatedEngine(self._hosts[self._num_started % len(self._hosts)], str(self._num_started))


def job_of(folder: Path, num_engines: int, groups_per_second: int) -> Job:
    """A job whose steps are so large that learners take one every `SECONDS_PER_STEP`."""
    document = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "rl": {
            "steps": 10**6,
            "prompts_per_step": groups_per_second * SECONDS_PER_STEP,
            "group_size": GROUP_SIZE,
            # As many steps as are under way in the engines, and a few that wait.
            "max_staleness": int(LATENCY_SECONDS / SECONDS_PER_STEP) + 2,
        },
        "generator": {"num_engines": num_engines, "max_new_tokens": 32, "max_model_len": 64},
        "learner": {"tokens_per_micro_batch": 64},
        "tasks": [{"name": "countdown"}],
    }
    job = Job(**document)  # type: ignore[arg-type]
    words = make_tasks(job.tasks)[0].vocabulary()  # type: ignore[attr-defined]
    shape = Pretrain(styles={}, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=1)
    write_new_model(folder / "model", shape, words)
    return job


@ray.remote(num_cpus=0)
class Learners:
    """Simulated learners: a step whenever one is due."""

    def __init__(self, registry: Any, queue: Any) -> None:
        self._registry, self._queue, self._num_groups = registry, queue, 0
        ray.get(registry.announce.remote(RankShard(0, 0, (), 0), 1, 0, "only"))
        threading.Thread(target=self._learn, daemon=True).start()

    def num_groups(self) -> int:
        """How many they have learned from."""
        return self._num_groups

    def _learn(self) -> None:
        due, step = time.monotonic(), 0
        while True:
            batch = take_batch(self._queue, step, 120.0).batch
            due = max(due + SECONDS_PER_STEP, time.monotonic() - 1)
            time.sleep(max(0.0, due - time.monotonic()))
            step += 1
            share = RankShard(step, 0, (), 0)
            ray.get(self._registry.announce.remote(share, 1, batch.next_problem, "only"))
            ray.get(self._queue.drop_before.remote(step - 1))
            self._num_groups += len(batch.groups)


@contextmanager
def running(job: Job, num_hosts: int, latency_seconds: float) -> Iterator[tuple[Any, Any, threading.Thread]]:
    """Board, queue and the thread of the loop, with engines that stand."""
    Path(job.run.dir).mkdir()
    registry, queue, ended = PolicyVersions.remote(), BatchQueue.remote(), threading.Event()  # type: ignore[attr-defined]
    with SimulatedPool(job, num_hosts, latency_seconds) as pool, RewardPool(job.tasks, job.rewards) as reward_pool:
        pool.wait_ready()
        stage = RolloutStage(job, RunDir(job), "rl", job.model.path)
        workers, link = Workers(pool, None, reward_pool), Link(registry, queue, ended)
        loop = threading.Thread(target=rollout_loop, args=(stage, workers, link), daemon=True)
        loop.start()
        yield registry, queue, loop
        ended.set()
        loop.join(30)


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far, by what used them."""
    found = {"loop": sum(psutil.Process().cpu_times()[:2])}
    for process in psutil.Process().children(recursive=True):
        try:
            title = (process.cmdline() or [""])[0].removeprefix("ray::").split(".")[0]
            used = sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
        for name in ("PolicyVersions", "BatchQueue", "RewardWorker", "Learners", "Host"):
            if title.startswith(name):
                found[name] = found.get(name, 0.0) + used
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=int, default=256)
    parser.add_argument("--groups-per-second", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    logging.getLogger("pear_ray").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(Path(folder), arguments.engines, arguments.groups_per_second)
        with running(job, HOSTS, LATENCY_SECONDS) as (registry, queue, loop):
            learners = Learners.remote(registry, queue)  # type: ignore[attr-defined]
            while ray.get(learners.num_groups.remote()) < WARM_UP_STEPS * job.rl.prompts_per_step:
                time.sleep(1)
            measure(loop, learners, arguments.seconds)
    ray.shutdown()


def measure(loop: threading.Thread, learners: Any, seconds: float) -> None:
    """Print what the loop did in so many seconds."""
    started, used = time.monotonic(), cpu_seconds()
    memory, num_before = psutil.Process().memory_info().rss, ray.get(learners.num_groups.remote())
    time.sleep(seconds)
    assert loop.is_alive(), "the loop ended"
    passed = time.monotonic() - started
    now = cpu_seconds()
    groups = ray.get(learners.num_groups.remote()) - num_before
    print(f"groups per second    {groups / passed:10.0f}")
    for name, total in now.items():
        print(f"CPU of {name:<14}{(total - used.get(name, 0.0)) / passed:10.2f} cores")
    gained = psutil.Process().memory_info().rss - memory
    print(f"memory gained        {gained / 2**20:10.1f} MiB of {memory / 2**20:.0f}")


if __name__ == "__main__":
    main()
