"""`cluster/vm/notice.py` hears of the cloud's notice, and Ray of it, before the machine goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from ray.core.generated.common_pb2 import NodeDeathInfo

from tests.cluster.growing import free_port

NOTICE = Path(__file__).parents[2] / "cluster/vm/notice.py"
SESSION_TOKEN = "of-this-session"
ACTION = json.dumps({"action": "terminate", "time": "2026-11-22T12:00:00Z"})


class Metadata(BaseHTTPRequestHandler):
    """Answers as the documentation of EC2 (version 2 of its service) and Compute Engine says."""

    is_noticed = False

    def do_PUT(self) -> None:
        is_token = self.path == "/latest/api/token"
        has_life = "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        self.reply(200 if is_token and has_life else 400, SESSION_TOKEN)

    def do_GET(self) -> None:
        if self.path == "/computeMetadata/v1/instance/preempted":
            known = self.headers.get("Metadata-Flavor") == "Google"
            self.reply(200 if known else 403, "TRUE" if self.is_noticed else "FALSE")
        elif self.headers.get("X-aws-ec2-metadata-token") != SESSION_TOKEN:
            self.reply(401, "")
        else:
            is_there = self.path == "/latest/meta-data/spot/instance-action" and self.is_noticed
            self.reply(200 if is_there else 404, ACTION if is_there else "")

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served() -> Iterator[tuple[type[Metadata], str]]:
    """A metadata service of its own, and its address."""
    handler = type("Own", (Metadata,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield handler, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def one_node() -> Iterator[Cluster]:
    """One node, as a machine in a cloud has it."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"object_store_memory": 100 * 2**20, "include_dashboard": False}
    )
    yield cluster
    cluster.shutdown()


def watch(cloud: str, address: str, cluster: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, NOTICE, cloud, "--metadata", address, "--seconds-between", "0.1"]
    return subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": cluster})


def test_a_cloud_without_an_answer_gives_no_notice() -> None:
    process = watch("aws", f"http://127.0.0.1:{free_port()}")
    time.sleep(2)
    assert process.poll() is None
    process.kill()
    process.wait()


@pytest.mark.cluster
@pytest.mark.nightly
@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_drains_the_node_once_the_cloud_says_so(one_node: Cluster, cloud: str) -> None:
    with served() as (metadata, address):
        process = watch(cloud, address, one_node.address)
        try:
            time.sleep(2)
            assert process.poll() is None, "nothing was noticed"
            assert all(node["Alive"] for node in one_node.global_state.node_table())
            metadata.is_noticed = True
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
    assert drained(one_node) == ["AUTOSCALER_DRAIN_PREEMPTED"]


def drained(cluster: Cluster) -> list[str]:
    """Why nodes have gone; one that nothing runs on goes as soon as it may."""
    deadline = time.monotonic() + 20
    while not (gone := [n for n in cluster.global_state.node_table() if not n["Alive"]]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return [NodeDeathInfo.Reason.Name(node["DeathReason"]) for node in gone]
