"""RL survives kills: it ends at its last step, trains on every problem once, and never on tokens that are too stale.

PEAR_RAY_RL_STAGE=cooperate runs BRIDGE instead; PEAR_RAY_RL_KILLS=all kills engines and learners more often.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from pear_ray.config import TaskSpec
from pear_ray.rl.recording import read_batch
from pear_ray.statistics import seed_of
from pear_ray.tasks import endless_problems
from tests.rl.parity_corpus import write_corpus
from tests.tiny_job import tiny_job

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]

SECONDS = 400.0
STEPS, STALENESS, PROBLEMS, GROUP = 60, 1, 4, 4
TASK = {"name": "tests.rl.parity_task:Parity"}
RAYLETS = {"object_store_memory": 128 * 2**20, "include_dashboard": False}
# Kills of each kind of actor, besides a node and the driver. Engines and learners start slowly.
IS_ALL = os.environ.get("PEAR_RAY_RL_KILLS") == "all"
STAGE = os.environ.get("PEAR_RAY_RL_STAGE", "rl")
KILLS = {
    "PolicyVersions": 6,
    "BatchQueue": 6,
    "RewardWorker": 5,
    "EngineActor": 4 if IS_ALL else 1,
    "RayTrainWorker": 3 if IS_ALL else 1,
}


@pytest.fixture(scope="module")
def job(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    path = tiny_job(
        folder,
        tiny_model(True),
        TASK["name"],
        run={"seed": 3},
        rl={
            "steps": STEPS,
            "prompts_per_step": PROBLEMS,
            "group_size": GROUP,
            "max_staleness": STALENESS,
            "dynamic_sampling": True,
            "record": True,
            "learning_rate": 1e-4,
        },
        generator={"num_engines": 2},
        learner={"num_workers": 2, "save_every": 5, "max_failures": 10},
        corpus={"scored_path": f"{folder}/scored"},
        sft={"examples_per_step": 6},
        cooperate={"method": "bridge"},
    )
    write_corpus(folder / "scored", tiny_model(True), 100)
    return path


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextmanager
def driver(job: Path, address: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the stage in a new process; kill it at the end if it still runs."""
    with (job.parent / "driver.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pear_ray", STAGE, str(job)],
            stdout=log,
            stderr=log,
            env=os.environ | {"RAY_ADDRESS": address},
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


class Chaos:
    """Kills at random moments, each after the run has recovered from the one before."""

    def __init__(self, job: Path) -> None:
        self.job, self.folder, self.draw = job, job.parent / "run", random.Random(0)
        self.num_kills = 0

    def wait_recovered(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a step that no attempt reached before."""
        deadline, before = time.monotonic() + SECONDS, self.furthest()
        while self.furthest() <= before:
            text = (self.job.parent / "driver.log").read_text()
            assert process.poll() is None, text[-5000:]
            assert time.monotonic() < deadline, f"no step after {before} in {SECONDS:.0f} s: {text}"
            time.sleep(0.2)
        time.sleep(self.draw.random() / 2)

    def furthest(self) -> int:
        return max((row["step"] for row in rows(self.folder)), default=-1)

    def kill_one(self, kind: str) -> None:
        """Kill an actor of this kind as soon as there is one."""
        deadline = time.monotonic() + SECONDS
        while not (found := processes(kind)):
            assert time.monotonic() < deadline, f"no {kind} came in {SECONDS:.0f} s"
            time.sleep(0.2)
        self.draw.choice(found).kill()
        self.num_kills += 1


def processes(kind: str) -> list[psutil.Process]:
    """Return the actors of this kind among the children of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(f"ray::{kind}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def chaos(job: Path) -> Chaos:
    """Finish a run on a cluster of two nodes."""
    chaos = Chaos(job)
    kinds = [kind for kind, count in KILLS.items() for _ in range(count)]
    chaos.draw.shuffle(kinds)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **RAYLETS})
    try:
        node = cluster.add_node(num_cpus=3, **RAYLETS)
        with driver(job, cluster.address) as process:
            for kind in kinds[:-3]:
                chaos.wait_recovered(process)
                chaos.kill_one(kind)
            chaos.wait_recovered(process)
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=3, **RAYLETS)
            chaos.wait_recovered(process)
        with driver(job, cluster.address) as process:
            for kind in kinds[-3:]:
                chaos.wait_recovered(process)
                chaos.kill_one(kind)
            text = job.parent / "driver.log"
            assert process.wait(SECONDS) == 0, text.read_text()[-5000:]
        chaos.num_kills += 2
    finally:
        cluster.shutdown()
    return chaos


@pytest.mark.timeout(1800)
def test_the_run_ends_at_its_last_step(chaos: Chaos) -> None:
    assert chaos.num_kills >= 20
    assert [row["step"] for row in rows(chaos.folder)] == list(range(STEPS))
    assert (chaos.folder / STAGE / "export" / "model.safetensors").exists()


def test_every_problem_is_trained_on_once_or_dropped(chaos: Chaos) -> None:
    steps = rows(chaos.folder)
    assert all(one["next_problem"] == other["first_problem"] for one, other in pairwise(steps))
    assert steps[0]["first_problem"] == 0
    stream = endless_problems([TaskSpec(**TASK)], "train", seed_of(3, "rl"))
    for row in steps:
        path = chaos.folder / STAGE / "rollouts"
        batch = read_batch(path, row["step"])
        trained = [group.problem_id for group in batch.groups]
        count = row["next_problem"] - row["first_problem"]
        drawn = [next(stream)[1].problem_id for _ in range(count)]
        assert sorted([*trained, *batch.dropped]) == sorted(drawn)
        assert len(trained) == PROBLEMS and len(batch.dropped) == row["problems_dropped"]


def test_staleness_is_bounded(chaos: Chaos) -> None:
    lags = [row["staleness_max"] for row in rows(chaos.folder)]
    assert max(lags) == STALENESS and min(lags) >= 0


def test_log_probs_of_engines_and_learners_agree(chaos: Chaos) -> None:
    gaps = [row["logprob_parity_max"] for row in rows(chaos.folder)]
    measured = [gap for gap in gaps if gap is not None]
    assert len(measured) > STEPS / 2 and max(measured) <= 1e-4


def test_deaths_and_resumes_are_recorded_as_events(chaos: Chaos) -> None:
    lines = (chaos.folder / "events.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds.count("died") >= KILLS["EngineActor"] and "resumed" in kinds
