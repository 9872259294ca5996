"""Nodes of a cluster on this machine: what runs on them, and waiting for it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

SECONDS = 400.0
# Of a job whose roles keep to the nodes with their labels.
PLACED = """
[weights]
max_probe_gap = 1e-4
[verifier]
processes = 1
[placement]
learners = {"pear-ray/role" = "learner"}
generators = {"pear-ray/role" = "generator"}
"""
RAYLETS = {"object_store_memory": 128 * 2**20, "include_dashboard": False}


def kinds_on(node: Any) -> set[str]:
    """Kinds of actors, and names of tasks, in the processes of a node."""
    (raylet,) = node.all_processes["raylet"]
    found = set()
    for process in psutil.Process(raylet.process.pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::"):
            found.add(title.removeprefix("ray::").split(".")[0].split("(")[0].split()[0])
    return found


def until(process: subprocess.Popen[bytes], log: Path, what: Callable[[], bool]) -> None:
    """Wait for something while a driver lives."""
    deadline = time.monotonic() + SECONDS
    while not what():
        assert process.poll() is None, log.read_text()[-5000:]
        assert time.monotonic() < deadline, log.read_text()[-5000:]
        time.sleep(0.1)
