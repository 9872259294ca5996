"""Roles keep to the nodes that the job names, and leave them in time when they are taken back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.cluster.nodes import PLACEMENT, RAYLETS, SECONDS, kinds_on, until
from tests.tiny_job import tiny_job

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]

STEPS = 40
# The only checkpoint is the one that a notice calls for.
NEVER = 10_000


@dataclass
class Story:
    """What was seen of a run whose nodes were taken back one after the other."""

    folder: Path
    first_places: dict[str, set[str]]
    """Roles of the nodes that hold actors of each kind, before anything was taken back."""
    kept_step: int
    """The step that the checkpoint on notice goes on from."""
    noticed_step: int
    """The latest step when notice was given."""


def write_job(folder: Path, model: Path) -> Path:
    return tiny_job(
        folder,
        model,
        rl={"steps": STEPS, "prompts_per_step": 4, "group_size": 4, "learning_rate": 1e-4},
        learner={"num_workers": 2, "save_every": NEVER},
        placement=PLACEMENT,
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def furthest(folder: Path) -> int:
    return max((row["step"] for row in rows(folder)), default=-1)


def kept_steps(folder: Path) -> list[int]:
    """Steps that the checkpoints of a run go on from."""
    found = (folder / "rl").rglob("progress.json")
    return sorted(json.loads(path.read_text())["next_step"] for path in found)


def give_notice(cluster: Cluster, node: Any) -> None:
    """As a cloud's spot notice, or KubeRay's before a pod ends."""
    command = [
        str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address,
        "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "taken back", "--deadline-remaining-seconds", "60",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=60, capture_output=True)


@pytest.fixture(scope="module")
def story(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("taken")
    job, run, log = write_job(folder, tiny_model(True)), folder / "run", folder / "driver.log"
    with pytest.MonkeyPatch.context() as patch:
        # Read by Ray Train's controller and ranks, which inherit it from their nodes.
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
        patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **RAYLETS})
        try:
            nodes = {
                role: cluster.add_node(num_cpus=3, labels={"pear-ray/role": role}, **RAYLETS)
                for role in ("learner", "generator")
            }
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "pear_ray", "rl", str(job)],
                    stdout=output,
                    stderr=output,
                    env=os.environ | {"RAY_ADDRESS": cluster.address},
                )
            try:
                yield tell_story(cluster, nodes, process, run, log)
            finally:
                process.kill()
                process.wait()
        finally:
            cluster.shutdown()


def tell_story(cluster: Cluster, nodes: dict[str, Any], process: Any, run: Path, log: Path) -> Story:
    until(process, log, lambda: furthest(run) >= 2)
    places: dict[str, set[str]] = {}
    for role, node in nodes.items():
        for kind in kinds_on(node):
            places.setdefault(kind, set()).add(role)
    for role in nodes:
        cluster.add_node(num_cpus=3, labels={"pear-ray/role": role}, **RAYLETS)
    give_notice(cluster, nodes["generator"])
    until(process, log, lambda: "EngineActor" not in kinds_on(nodes["generator"]))
    cluster.remove_node(nodes["generator"], allow_graceful=False)
    before = furthest(run)
    until(process, log, lambda: furthest(run) > before)
    noticed = furthest(run)
    give_notice(cluster, nodes["learner"])
    until(process, log, lambda: bool(kept_steps(run)))
    (kept,) = kept_steps(run)
    cluster.remove_node(nodes["learner"], allow_graceful=False)
    assert process.wait(SECONDS) == 0, log.read_text()[-5000:]
    return Story(run, places, kept, noticed)


@pytest.mark.timeout(1200)
def test_roles_keep_to_the_nodes_with_their_labels(story: Story) -> None:
    assert story.first_places["EngineActor"] == {"generator"}
    assert story.first_places["RayTrainWorker"] == {"learner"}


def test_an_engine_hands_its_work_back_on_notice(story: Story) -> None:
    events = [json.loads(line) for line in (story.folder / "events.jsonl").open()]
    kinds = [event["kind"] for event in events]
    assert "preempted" in kinds
    assert "died" not in kinds, "the engine left only with its node"


def test_learners_keep_a_checkpoint_on_notice_and_go_on_from_it(story: Story) -> None:
    assert story.noticed_step <= story.kept_step < STEPS
    assert [row["step"] for row in rows(story.folder)] == list(range(STEPS))


def test_every_problem_is_learned_from_once(story: Story) -> None:
    steps = rows(story.folder)
    firsts = [row["first_problem"] for row in steps]
    assert firsts == [0, *(row["next_problem"] for row in steps[:-1])]
