"""The whole chain on a job of minutes, driven as `ray job submit` would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import ray

TINY = Path(__file__).parent / "jobs" / "tiny.toml"
SECONDS = 900.0


def drive(folder: Path) -> subprocess.Popen[bytes]:
    """The job's driver in a process of its own, on the Ray of the tests."""
    log = (folder.parent / "driver.log").open("ab")
    command = [sys.executable, "-m", "pear_ray", "pipeline", str(TINY), "--run.dir", str(folder)]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


@contextmanager
def scraped(found: set[str]) -> Iterator[None]:
    """Add the names of all metrics that the node tells of while the block runs."""
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(2.0):
            with urllib.request.urlopen(address, timeout=30) as answer:
                lines = answer.read().decode().splitlines()
            found.update(re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#"))

    with ThreadPoolExecutor(1) as beside:
        looking = beside.submit(look)
        try:
            yield
        finally:
            ended.set()
        looking.result()
