"""Stage `rl` on nodes that share no network but a cable: each has an address, a loopback and shared memory of its
own, and the job comes from yet another machine."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.growing import RAY, STORE, Growing, of_nodes, with_token
from tests.cluster.namespaces import INTERFACE, Machine, machines, why_not
from tests.cluster.nodes import PLACEMENT, assert_trained_alike, with_sft_of
from tests.cluster.ports import page

REASON = why_not()
pytestmark = [pytest.mark.cluster, pytest.mark.nightly, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
# Role and CPUs of each node. Two learner nodes: a rank of one CPU fits on each.
NODES = (("head", 0), ("learner", 1), ("learner", 1), ("generator", 2))
# An address that only documents have (RFC 5737).
ELSEWHERE = "198.51.100.1"


@dataclass
class Story:
    """What was seen of the submitted run."""

    run: Path
    cluster: Growing
    nodes: list[Machine]
    job: dict[str, Any]
    opens_without_token: bool
    way_out: list[int]
    """Error numbers of each node's attempt to reach something else."""
    left: list[Any]
    """Processes that outlived the cluster."""


@contextmanager
def cluster_on(nodes: list[Machine]) -> Iterator[Growing]:
    """A head and its nodes, on a machine each; the calling thread must be in their network."""
    folder = Path(tempfile.mkdtemp(prefix="n-", dir=os.environ.get("RAY_TMPDIR")))
    outside, mark, head = with_token(folder), uuid.uuid4().hex, nodes[0].address
    # Left alone, gloo takes the address of the host's name, which may be that of the loopback.
    inside = outside | of_nodes(mark) | {"GLOO_SOCKET_IFNAME": INTERFACE}
    cluster = Growing(folder, f"http://{head}:8265", outside, mark)
    first, *others = (
        node.command(
            RAY, "start", "--node-ip-address", node.address, "--num-cpus", str(cpus),
            "--labels", f"pear-ray/role={role}", "--object-store-memory", str(STORE),
            "--temp-dir", str(folder / str(number)), "--disable-usage-stats",
        )
        for number, (node, (role, cpus)) in enumerate(zip(nodes, NODES, strict=True))
    )  # fmt: skip
    try:
        cluster.start([*first, "--head", "--port", "6379", "--dashboard-host", head], inside)
        with ThreadPoolExecutor() as max_parallel:
            join = [[*other, "--address", f"{head}:6379"] for other in others]
            list(max_parallel.map(lambda command: cluster.start(command, inside), join))
        cluster.wait_for_dashboard()
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


def way_out(node: Machine) -> int:
    with node.network(), socket.socket() as attempt:
        attempt.settimeout(5)
        return attempt.connect_ex((ELSEWHERE, 80))


@pytest.fixture(scope="module")
def story(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The model to start from comes from the run on one node, which has ended before."""
    run = tmp_path_factory.mktemp("apart") / "run"
    job = with_sft_of(tiny_run, run, learner={"cpus_per_worker": 1.0}, placement=PLACEMENT)
    with machines(1 + len(NODES)) as (outside, *nodes):
        with outside.network(), cluster_on(nodes) as cluster:
            name = cluster.submit(sys.executable, "-m", "pear_ray", "rl", str(job))
            told = cluster.succeeded(name)
            opens = page(f"{cluster.dashboard}/api/jobs/")
        errors = [way_out(node) for node in nodes]
        return Story(run, cluster, nodes, told, opens, errors, cluster.processes())


@pytest.mark.timeout(2000)
def test_the_result_is_that_of_one_node(story: Story, tiny_run: Path) -> None:
    assert_trained_alike(story.run, tiny_run / "arms/pear", ("rl",))


def test_ranks_and_engines_ran_on_the_machines_with_their_labels(story: Story) -> None:
    _, first, second, generator = (node.address for node in story.nodes)
    assert story.cluster.places_seen["RayTrainWorker"] == {"learner"}
    assert story.cluster.places_seen["EngineActor"] == {"generator"}
    assert story.cluster.addresses_seen["RayTrainWorker"] == {first, second}
    assert story.cluster.addresses_seen["EngineActor"] == {generator}


def test_nodes_reach_nothing_but_each_other(story: Story) -> None:
    assert story.way_out == [errno.ENETUNREACH] * len(NODES)


def test_the_dashboard_refuses_another_machine_without_the_token(story: Story) -> None:
    assert not story.opens_without_token


def test_nothing_is_left(story: Story) -> None:
    assert story.left == []
