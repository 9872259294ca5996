"""The node that works is lost, in each stage that has no kill test of its own; `score`, `sft` and `rl` have theirs in
the folders of their tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from tests.cluster.nodes import RAYLETS, SECONDS, kinds_on, until
from tests.tiny_chain import TINY

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that computes nothing."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **RAYLETS})
    yield cluster
    cluster.shutdown()


def again_without(tiny_run: Path, folder: Path, stage: str, outputs: str) -> Path:
    """A copy of the finished run in which one stage is still to be done."""
    run = folder / "run"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / outputs)
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["stages"][stage]
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def lose_the_node(cluster: Cluster, run: Path, stage: str, kind: str, working: str) -> None:
    """Do a stage, and take its node away once `kind` runs there and the log says `working`."""
    node = cluster.add_node(num_cpus=2, **RAYLETS)
    log = run.parent / "driver.log"
    command = [sys.executable, "-m", "pear_ray", stage, str(TINY), "--run.dir", str(run)]
    with log.open("ab") as output:
        environment = os.environ | {"RAY_ADDRESS": cluster.address}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        until(process, log, lambda: kind in kinds_on(node) and working in log.read_text())
        cluster.remove_node(node, allow_graceful=False)
        node = cluster.add_node(num_cpus=2, **RAYLETS)
        assert process.wait(SECONDS) == 0, log.read_text()[-5000:]
    finally:
        process.kill()
        process.wait()
    cluster.remove_node(node)


def events(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


@pytest.mark.timeout(900)
def test_pretrain_makes_the_same_models(cluster: Cluster, tiny_run: Path, tmp_path: Path) -> None:
    run = again_without(tiny_run, tmp_path, "pretrain", "pretrain")
    lose_the_node(cluster, run, "pretrain", "train_model", "pretrain: starts")
    for name in ("base", "teacher_plain", "teacher_cipher"):
        path = Path("pretrain", name, "model.safetensors")
        assert (run / path).read_bytes() == (tiny_run / path).read_bytes()


@pytest.mark.timeout(900)
def test_sample_writes_the_same_corpus(cluster: Cluster, tiny_run: Path, tmp_path: Path) -> None:
    run = again_without(tiny_run, tmp_path, "sample", "sample")
    lose_the_node(cluster, run, "sample", "EngineActor", " correct of ")
    assert "died" in {event["kind"] for event in events(run)}
    for source in ("teacher_plain", "teacher_cipher"):
        lost, whole = (pq.read_table(r / "sample" / f"{source}.parquet").to_pydict() for r in (run, tiny_run))
        gaps = [
            np.abs(np.subtract(one, other)).max()
            for one, other in zip(lost.pop("behavior_logprobs"), whole.pop("behavior_logprobs"), strict=True)
        ]
        assert lost == whole and max(gaps) <= 1e-4


@pytest.mark.timeout(900)
def test_evaluate_finds_the_same(cluster: Cluster, tiny_run: Path, tmp_path: Path) -> None:
    run = again_without(tiny_run, tmp_path, "evaluate", "evaluate")
    lose_the_node(cluster, run, "evaluate", "EngineActor", " requests")
    assert "died" in {event["kind"] for event in events(run)}
    lost, whole = (json.loads((r / "evaluate/scorecard.json").read_text())["checkpoints"] for r in (run, tiny_run))
    assert lost.keys() == whole.keys()
    for label in lost:
        assert lost[label]["pass_at_k"] == whole[label]["pass_at_k"]
