"""A cluster as its users have it: a head, Ray's own autoscaler over nodes that it starts and ends on this machine, a
token, jobs that come from outside, and Prometheus beside it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.util import get_node_ip_address

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
HEAD_ID = "fe" * 28
STORE = 128 * 2**20
ROLES = ("learner", "generator")
SECONDS = 900.0
# Between looks at the cluster: the dashboard answers them on the cores that the run needs.
LOOK_SECONDS = 2.0
MARK = "PEAR_RAY_TEST_CLUSTER"
# What the autoscaler wants to be told and such nodes do not need.
COMMANDS = (
    "initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray",
)  # fmt: skip
TOKEN = "0123456789abcdef" * 4


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("", 0))
        return listening.getsockname()[1]


def get(address: str, token: str | None = None) -> Any:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
        return json.load(answer)


def marked(name: str, value: str) -> list[psutil.Process]:
    """Processes that have a variable with this value in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(name) == value:
                found.append(process)
    return found


@dataclass
class Growing:
    """A running cluster, and what was seen of it."""

    folder: Path
    dashboard: str
    environment: dict[str, str]
    mark: str
    nodes_seen: list[dict[str, int]] = field(default_factory=list)
    """Living nodes by role, each time that it changed."""
    places_seen: dict[str, set[str]] = field(default_factory=dict)
    """Roles of the nodes on which actors of each kind were seen."""
    addresses_seen: dict[str, set[str]] = field(default_factory=dict)
    """Addresses of those nodes."""

    def processes(self) -> list[psutil.Process]:
        return marked(MARK, self.mark)

    def states(self, kind: str, *filters: str) -> list[dict[str, Any]]:
        """What Ray's state API tells of all nodes, or of all actors."""
        asked = "".join(
            f"&filter_keys={key}&filter_predicates=%3D&filter_values={value}"
            for key, _, value in (one.partition("=") for one in filters)
        )
        answer = get(f"{self.dashboard}/api/v0/{kind}?limit=9999&detail=true{asked}", TOKEN)
        return answer["data"]["result"]["result"]

    def look(self) -> None:
        """Note which nodes live, and which actors on them."""
        nodes = {one["node_id"]: one for one in self.states("nodes") if one["state"] == "ALIVE"}
        roles = {name: one["labels"]["pear-ray/role"] for name, one in nodes.items()}
        counts = {role: sorted(roles.values()).count(role) for role in ROLES}
        if self.nodes_seen[-1:] != [counts]:
            self.nodes_seen.append(counts)
        for actor in self.states("actors", "state=ALIVE"):
            if actor["node_id"] in roles:
                kind, node = actor["class_name"], actor["node_id"]
                self.places_seen.setdefault(kind, set()).add(roles[node])
                self.addresses_seen.setdefault(kind, set()).add(nodes[node]["node_ip"])

    def submit(self, *words: str) -> str:
        """`ray job submit` from a machine that has the token and nothing else."""
        printed = subprocess.run(
            [RAY, "job", "submit", "--address", self.dashboard, "--no-wait", "--", *words],
            env=self.environment, capture_output=True, text=True, timeout=120, check=True,
        ).stdout  # fmt: skip
        return printed.split("Job '")[1].split("'")[0]

    def job(self, name: str) -> dict[str, Any]:
        return get(f"{self.dashboard}/api/jobs/{name}", TOKEN)

    def log(self, name: str) -> str:
        return get(f"{self.dashboard}/api/jobs/{name}/logs", TOKEN)["logs"]

    def until(self, what: Callable[[], bool], name: str, seconds: float = SECONDS) -> None:
        """Look on until something is so, while the job of that name lives."""
        deadline = time.monotonic() + seconds
        while not what():
            assert self.job(name)["status"] in ("PENDING", "RUNNING"), self.log(name)[-5000:]
            assert time.monotonic() < deadline, self.log(name)[-5000:]
            self.look()
            time.sleep(LOOK_SECONDS)

    def succeeded(self, name: str, seconds: float = SECONDS) -> dict[str, Any]:
        """The job of that name once it has ended, which must be well; looks on meanwhile."""
        deadline = time.monotonic() + seconds
        while (job := self.job(name))["status"] in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline, self.log(name)[-5000:]
            self.look()
            time.sleep(LOOK_SECONDS)
        assert job["status"] == "SUCCEEDED", self.log(name)[-5000:]
        return job

    def until_alone(self, seconds: float) -> None:
        """Look on until all nodes but the head have gone, or for so long."""
        deadline = time.monotonic() + seconds
        while any(self.nodes_seen[-1].values()) and time.monotonic() < deadline:
            self.look()
            time.sleep(LOOK_SECONDS)

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        """`ray start`, whose daemons would keep a pipe open for ever."""
        log = self.folder / "start.log"
        with log.open("ab") as output:
            started = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=120)
        assert started.returncode == 0, log.read_text()[-3000:]

    def wait_for_dashboard(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            with suppress(OSError):
                self.states("nodes")
                return
            assert time.monotonic() < deadline, "the dashboard does not answer"
            time.sleep(0.5)

    def end(self) -> None:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes():
                with suppress(psutil.Error):
                    process.send_signal(kind)
            psutil.wait_procs(self.processes(), timeout=5)


def node_types() -> dict[str, Any]:
    workers = {
        role: {
            "min_workers": 0,
            "max_workers": 1 if role == "learner" else 2,
            "resources": {"CPU": 2, "object_store_memory": STORE},
            "labels": {"pear-ray/role": role},
            "node_config": {},
        }
        for role in ROLES
    }
    head = {"resources": {"CPU": 0}, "labels": {"pear-ray/role": "head"}, "node_config": {}}
    return workers | {"ray.head.default": head | {"max_workers": 0}}


def with_token(folder: Path) -> dict[str, str]:
    """The environment of whoever may use a cluster with a token of its own in this folder."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    return {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", MARK))} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "TMPDIR": str(folder),
    }


def of_nodes(mark: str) -> dict[str, str]:
    """What the nodes of such a cluster have in their environment besides."""
    return {MARK: mark, "RAY_worker_niceness": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@contextmanager
def growing_cluster(secrets: dict[str, str], idle_minutes: float) -> Iterator[Growing]:
    """A head of its own with `secrets` in its environment, and up to three more nodes."""
    folder = Path(tempfile.mkdtemp(prefix="g-", dir=os.environ.get("RAY_TMPDIR")))
    gcs_port, dashboard_port = free_port(), free_port()
    mark = uuid.uuid4().hex
    config = {
        "cluster_name": "growing",
        "max_workers": 3,
        "idle_timeout_minutes": idle_minutes,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "gcs_address": f"{get_node_ip_address()}:{gcs_port}",
        },
        "available_node_types": node_types(),
        "head_node_type": "ray.head.default",
        "upscaling_speed": 4.0,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
    } | {f"{part}_commands": [] for part in COMMANDS}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(config))
    outside = with_token(folder)
    head = outside | secrets | of_nodes(mark) | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }  # fmt: skip
    cluster = Growing(folder, f"http://127.0.0.1:{dashboard_port}", outside, mark)
    command = [
        RAY, "start", "--head", "--port", str(gcs_port), "--dashboard-host", "127.0.0.1",
        "--dashboard-port", str(dashboard_port), "--dashboard-agent-listen-port", "0",
        "--num-cpus", "0", "--object-store-memory", str(STORE), "--temp-dir", str(folder / "t"),
        "--labels", "pear-ray/role=head", "--disable-usage-stats",
        "--autoscaling-config", str(folder / "cluster.yaml"),
    ]  # fmt: skip
    try:
        cluster.start(command, head)
        cluster.wait_for_dashboard()
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def prometheus(cluster: Growing, program: str) -> Iterator[str]:
    """A real Prometheus with this project's settings and rules; its address."""
    settings = yaml.safe_load((ROOT / "cluster/prometheus/prometheus.yml").read_text())
    (scrape,) = settings["scrape_configs"]
    (nodes,) = scrape["file_sd_configs"]
    nodes["files"] = [str(cluster.folder / "t" / Path(nodes["files"][0]).name)]
    nodes["refresh_interval"] = settings["global"]["evaluation_interval"] = "2s"
    settings["global"]["scrape_interval"] = "2s"
    settings["rule_files"] = [str(ROOT / "cluster/prometheus/rules.yml")]
    (cluster.folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    port = free_port()
    with (cluster.folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={cluster.folder}/prometheus.yml",
                f"--web.listen-address=127.0.0.1:{port}",
                f"--storage.tsdb.path={cluster.folder}/series",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
