"""Whatever is killed while scoring, the rows are bit-identical to an uninterrupted run."""

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

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]

SECONDS = 400.0
# Kills of the actor alone, before those of its node and of the driver.
NUM_ACTOR_KILLS = int(os.environ.get("PEAR_RAY_ACTOR_KILLS", "0"))
RAYLETS = {"object_store_memory": 128 * 2**20, "include_dashboard": False}


@contextmanager
def cluster_of_two() -> Iterator[Cluster]:
    """Start a head node too small for an engine; nodes are added on the same machine."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **RAYLETS})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def start_stage(job: Path, folder: Path, cluster: Cluster) -> subprocess.Popen[bytes]:
    """Run the stage in a process of its own."""
    log = (folder / "driver.log").open("ab")
    args = ["score", str(job), "--run.dir", str(folder / "run")]
    return subprocess.Popen(
        [sys.executable, "-m", "pear_ray", *args],
        stdout=log,
        stderr=log,
        env=os.environ | {"RAY_ADDRESS": cluster.address},
    )


def scorers() -> list[psutil.Process]:
    """Return the scoring actors among the children of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "MapWorker(Map(Scorer))" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def stored_shards(folder: Path) -> set[Path]:
    """Return the log-prob files of finished shards."""
    return set((folder / "run" / "scored.partial" / "logprobs").glob("*.parquet"))


def wait_for_shard(folder: Path, driver: subprocess.Popen[bytes]) -> None:
    """Wait until one more shard is stored than now."""
    before, deadline = len(stored_shards(folder)), time.monotonic() + SECONDS
    while len(stored_shards(folder)) <= before:
        assert driver.poll() is None, (folder / "driver.log").read_text()[-5000:]
        assert time.monotonic() < deadline, f"waited {SECONDS:.0f} s for a shard"
        time.sleep(0.05)


def table_of(folder: Path) -> Any:
    files = sorted((folder / "scored").glob("*.parquet"))
    return pq.ParquetDataset([str(file) for file in files]).read().combine_chunks()


@pytest.mark.timeout(1500)
def test_rows_do_not_depend_on_kills(corpus: Any, scored_run: Path, tmp_path: Path) -> None:
    """Kill the scoring actor at random moments, then its node, then the driver."""
    draw = random.Random(0)
    with cluster_of_two() as cluster:
        node = cluster.add_node(num_cpus=2, **RAYLETS)
        driver = start_stage(corpus.job, tmp_path, cluster)
        try:
            for _ in range(NUM_ACTOR_KILLS):
                wait_for_shard(tmp_path, driver)
                time.sleep(draw.random())
                (victim,) = scorers()
                victim.kill()
                victim.wait(10)
            wait_for_shard(tmp_path, driver)
            cluster.remove_node(node, allow_graceful=False)
            assert not scorers()
            cluster.add_node(num_cpus=2, **RAYLETS)
            wait_for_shard(tmp_path, driver)
            driver.kill()
            driver.wait()
            times = {path: path.stat().st_mtime_ns for path in stored_shards(tmp_path)}
            driver = start_stage(corpus.job, tmp_path, cluster)
            wait_for_shard(tmp_path, driver)
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
    # An engine that dies before its first result was never seen.
    assert kinds.count("restarted") <= NUM_ACTOR_KILLS + 1 and "resumed" in kinds
