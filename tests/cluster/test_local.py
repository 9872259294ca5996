"""`cluster/local.sh start`: who can reach what it opens, and that `stop` ends all of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.growing import free_port, get, marked
from tests.cluster.ports import answered, page

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]

ROOT = Path(__file__).resolve().parents[2]
MARK = "PEAR_RAY_LOCAL_CLUSTER"


def local(word: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "cluster/local.sh"), word]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | more
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def processes() -> list[psutil.Process]:
    return marked(MARK, str(ROOT))


@pytest.fixture(scope="module")
def local_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """Port of the dashboard of a started cluster, and its token's file."""
    if processes():
        pytest.fail("a cluster of this checkout runs; end it first: bash cluster/local.sh stop")
    port, token = free_port(), tmp_path_factory.mktemp("home") / "deep" / "token"
    where = {"PEAR_RAY_DASHBOARD_PORT": str(port), "RAY_AUTH_TOKEN_PATH": str(token)}
    try:
        started = local("start", **where)
        assert started.returncode == 0, started.stderr
        yield port, token
    finally:
        stopped = local("stop")
        assert stopped.returncode == 0, stopped.stderr
        assert processes() == []


def listening() -> set[tuple[str, int]]:
    return {
        (found.laddr.ip, found.laddr.port)
        for process in processes()
        for found in process.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN
    }


def test_nothing_can_be_reached_from_another_machine(local_cluster: tuple[int, Path]) -> None:
    addresses = listening()
    assert ("127.0.0.1", local_cluster[0]) in addresses and len(addresses) >= 8
    assert {ip for ip, _ in addresses} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_every_port_refuses_who_has_no_token(local_cluster: tuple[int, Path]) -> None:
    """But for the numbers that Prometheus reads."""
    told = {port: found for _, port in listening() if (found := answered(port))}
    metrics = [port for port, found in told.items() if "/metrics" in found]
    assert told.keys() == set(metrics) and len(metrics) <= 3
    for port in metrics:
        assert all(call.startswith(("/api", "/logs", "/get", "/metrics")) for call in told[port])


def test_the_token_opens_the_dashboard_and_belongs_to_its_owner(local_cluster: tuple[int, Path]) -> None:
    port, token = local_cluster
    address = f"http://127.0.0.1:{port}/api/jobs/"
    assert not page(address)
    assert get(address, token.read_text()) == []
    assert token.stat().st_mode & 0o777 == 0o600
