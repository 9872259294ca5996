"""Whoever is killed while scoring, the rows are those of an undisturbed run, to the bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

SECONDS = 400.0
# Of the actor alone; its whole node and the driver follow.
NUM_ACTOR_KILLS = int(os.environ.get("PEAR_RAY_ACTOR_KILLS", "0"))
RAYLETS = {"object_store_memory": 128 * 2**20, "include_dashboard": False}


@contextmanager
def cluster_of_two() -> Iterator[Cluster]:
    """A head too small for an engine, and room for one node more; both on this machine."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **RAYLETS})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def begin(job: Path, folder: Path, cluster: Cluster) -> subprocess.Popen[bytes]:
    """The stage in a process of its own."""
    log = (folder / "driver.log").open("ab")
    words = ["score", str(job), "--run.dir", str(folder / "run")]
    return subprocess.Popen(
        [sys.executable, "-m", "pear_ray", *words],
        stdout=log,
        stderr=log,
        env=os.environ | {"RAY_ADDRESS": cluster.address},
    )


def scorers() -> list[psutil.Process]:
    """Scoring actors among the children of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "MapWorker(Map(Scorer))" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def parts(folder: Path) -> set[Path]:
    """Files of log-probs that are there."""
    return set((folder / "run" / "scored.partial" / "logprobs").glob("*.parquet"))


def another_part(folder: Path, driver: subprocess.Popen[bytes]) -> None:
    """Wait until one more part is stored than now."""
    before, deadline = len(parts(folder)), time.monotonic() + SECONDS
    while len(parts(folder)) <= before:
        assert driver.poll() is None, (folder / "driver.log").read_text()[-5000:]
        assert time.monotonic() < deadline, f"waited {SECONDS:.0f} s for a part"
        time.sleep(0.01)


def table_of(folder: Path) -> Any:
    files = sorted((folder / "scored").glob("*.parquet"))
    return pq.ParquetDataset([str(file) for file in files]).read().combine_chunks()


@pytest.mark.timeout(1500)
def test_rows_do_not_depend_on_who_is_killed(corpus: Any, scored_run: Path, tmp_path: Path) -> None:
    """The scoring actor at random moments, then its whole node, then the driver."""
    draw = random.Random(0)
    with cluster_of_two() as cluster:
        node = cluster.add_node(num_cpus=2, **RAYLETS)
        driver = begin(corpus.job, tmp_path, cluster)
        try:
            for _ in range(NUM_ACTOR_KILLS):
                another_part(tmp_path, driver)
                time.sleep(draw.random())
                (victim,) = scorers()
                victim.kill()
                victim.wait(10)
            another_part(tmp_path, driver)
            cluster.remove_node(node, allow_graceful=False)
            assert not scorers()
            cluster.add_node(num_cpus=2, **RAYLETS)
            another_part(tmp_path, driver)
            driver.kill()
            driver.wait()
            times = {path: path.stat().st_mtime_ns for path in parts(tmp_path)}
            driver = begin(corpus.job, tmp_path, cluster)
            another_part(tmp_path, driver)
            assert {path: path.stat().st_mtime_ns for path in times} == times
            log = tmp_path / "driver.log"
            assert driver.wait(timeout=SECONDS) == 0, log.read_text()[-5000:]
        finally:
            driver.kill()
    assert table_of(tmp_path / "run").equals(table_of(scored_run))
    rejected = "scored/rejected.jsonl"
    assert (tmp_path / "run" / rejected).read_bytes() == (scored_run / rejected).read_bytes()
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    # An engine that dies before it tells of a part was never seen.
    assert kinds.count("restarted") <= NUM_ACTOR_KILLS + 1 and "resumed" in kinds
