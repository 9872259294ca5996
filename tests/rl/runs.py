"""Run a stage that trains on rollouts, interrupt it, and read its outputs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors.torch import load_file

from pear_ray.__main__ import run_command

SECONDS = 300.0


def rows(job: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl of the run beside a job file."""
    path = job.parent / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def weights(job: Path, stage: str) -> dict[str, torch.Tensor]:
    """Return the weights that a stage exported."""
    return load_file(job.parent / "run" / stage / "export" / "model.safetensors")


def are_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Return whether they are equal to the bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def run_cut_off(stage: str, job: Path, num_steps: int) -> None:
    """Run a stage of `num_steps` steps, kill its driver three steps before the end, and run the same command again.
    Batches recorded until then are copied to the folder `before` beside the job."""
    with (job.parent / "driver.log").open("ab") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "pear_ray", stage, str(job)],
            stdout=log,
            stderr=log,
            env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        )
    deadline = time.monotonic() + SECONDS
    while len(rows(job)) < num_steps - 3:
        text = (job.parent / "driver.log").read_text()
        assert driver.poll() is None and time.monotonic() < deadline, text[-5000:]
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert len(rows(job)) < num_steps
    recorded = job.parent / "run" / stage / "rollouts"
    if recorded.exists():
        shutil.copytree(recorded, job.parent / "before")
    assert run_command([stage, str(job)]) == 0
