"""The loss curve survives the death of a rank, a node or the driver unchanged."""

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
from safetensors.torch import load_file

from pear_ray.__main__ import run_command
from tests.tiny_job import tiny_job

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]

SECONDS = 300.0
# Kill a rank and the driver; "all" adds a node and the driver once more.
ALL = os.environ.get("PEAR_RAY_SFT_KILLS") == "all"
RAYLETS = {"object_store_memory": 128 * 2**20, "include_dashboard": False}
METRICS = ("loss", "nll", "grad_norm", "learning_rate", "num_tokens", "effective_sample_size")


@pytest.fixture(scope="module")
def job(corpus: Any, scored_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs over the scored corpus, shuffled in several windows."""
    return tiny_job(
        tmp_path_factory.mktemp("sft"),
        corpus.models["a"],
        "countdown",
        corpus={"scored_path": f"{scored_run}/scored"},
        sft={"learning_rate": 1e-3, "examples_per_step": 30, "epochs": 2, "rows_per_window": 100, "eval_every": 8},
        learner={
            "num_workers": 2,
            "cpus_per_worker": 1,
            "tokens_per_micro_batch": 1024,
            "save_every": 5,
            "max_failures": 5,
        },
        generator={"max_model_len": 64},
    )


def read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def undisturbed(job: Path, ray_session: None) -> Path:
    """An uninterrupted run on one rank."""
    assert run_command(["sft", str(job), "--learner.num_workers", "1"]) == 0
    return job.parent / "run"


@contextmanager
def driver(job: Path, cluster: Cluster, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The stage in its own process, killed on exit if it still runs."""
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    with (job.parent / "driver.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pear_ray", "sft", str(job), *arguments], stdout=log, stderr=log, env=environment
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for_step(step: int, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until metrics.jsonl has a step."""
    deadline = time.monotonic() + SECONDS
    while not any(row["step"] >= step for row in read_rows(folder)):
        log = folder.parent / "driver.log"
        assert process.poll() is None, log.read_text()[-5000:]
        assert time.monotonic() < deadline, f"waited {SECONDS:.0f} s for step {step}"
        time.sleep(0.1)


def kill_a_rank(draw: random.Random) -> None:
    ranks = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith("ray::RayTrainWorker"):
                ranks.append(process)
        except psutil.Error:
            continue
    assert ranks
    draw.choice(ranks).kill()


@pytest.fixture(scope="module")
def disturbed(job: Path, undisturbed: Path) -> Path:
    """The same run on its own cluster: killed, and finished by one rank instead of two."""
    folder, draw = job.parent / "disturbed", random.Random(0)
    arguments = ("--run.dir", str(folder))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **RAYLETS})
    try:
        node = cluster.add_node(num_cpus=2, **RAYLETS)
        with driver(job, cluster, *arguments) as process:
            wait_for_step(draw.randrange(6, 9), folder, process)
            kill_a_rank(draw)
            if ALL:
                wait_for_step(draw.randrange(11, 14), folder, process)
                cluster.remove_node(node, allow_graceful=False)
                cluster.add_node(num_cpus=2, **RAYLETS)
            wait_for_step(draw.randrange(16, 19), folder, process)
        if ALL:
            with driver(job, cluster, *arguments) as process:
                wait_for_step(draw.randrange(22, 24), folder, process)
        with driver(job, cluster, *arguments, "--learner.num_workers", "1") as process:
            assert process.wait(SECONDS) == 0, (job.parent / "driver.log").read_text()[-5000:]
    finally:
        cluster.shutdown()
    return folder


@pytest.mark.timeout(1200)
def test_the_loss_curve_matches_an_undisturbed_run(undisturbed: Path, disturbed: Path) -> None:
    theirs, ours = read_rows(undisturbed), read_rows(disturbed)
    assert len(theirs) >= 30
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [row["step"] for row in ours] == list(range(len(ours)))
    for mine, other in zip(ours, theirs, strict=True):
        for name in METRICS:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (name, mine)
        assert mine.get("heldout_loss") == pytest.approx(other.get("heldout_loss"), abs=1e-5)


def test_the_weights_match_an_undisturbed_run(undisturbed: Path, disturbed: Path) -> None:
    theirs, ours = (load_file(folder / "sft" / "export" / "model.safetensors") for folder in (undisturbed, disturbed))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= 1e-4


def test_every_row_is_trained_on_once_per_epoch(scored_run: Path, disturbed: Path) -> None:
    stored = sorted((scored_run / "scored").glob("*.parquet"))
    table = pq.read_table(stored, columns=["split", "response_ids", "trainable"])
    num_tokens = sum(
        len(row["response_ids"]) if row["trainable"] is None else sum(row["trainable"])
        for row in table.to_pylist()
        if row["split"] == "train"
    )
    assert sum(row["num_tokens"] for row in read_rows(disturbed)) == 2 * num_tokens


def test_the_loss_falls_and_held_out_rows_are_measured(undisturbed: Path) -> None:
    metrics = read_rows(undisturbed)
    assert metrics[-1]["nll"] < metrics[0]["nll"]
    measured = [row["heldout_loss"] for row in metrics if "heldout_loss" in row]
    assert len(set(measured)) >= 3
    assert metrics[-1]["lowest_heldout_loss"] == min(measured)
