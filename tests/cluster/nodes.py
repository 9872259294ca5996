"""Nodes of a cluster on this machine: what runs on them, waiting for it, and what came of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

SECONDS = 400.0
# Of a job whose roles keep to the nodes with their labels.
PLACEMENT = {"learners": {"pear-ray/role": "learner"}, "generators": {"pear-ray/role": "generator"}}
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


# Stages and their folders.
CORPUS = {"pretrain": "pretrain", "sample": "sample"}
SCORED = CORPUS | {"score": "scored"}


def with_stages_of(tiny_run: Path, run: Path, done: dict[str, str], **changed: Any) -> Path:
    """Make a run folder in which the stages `done` are those of a finished run, and all others are still to do.
    `changed` are keys of [learner] that differ."""
    for outputs in done.values():
        shutil.copytree(tiny_run / outputs, run / outputs)
    job = json.loads((tiny_run / "config.json").read_text())
    job["learner"] |= changed
    (run / "config.json").write_text(json.dumps(job))
    manifest = json.loads((tiny_run / "manifest.json").read_text())
    manifest["stages"] = {name: manifest["stages"][name] for name in done}
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics without what clocks say."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    clocks = re.compile("time|seconds|per_second|num_engines")
    return [{k: v for k, v in row.items() if not clocks.search(k)} for row in rows]


def assert_same_results(run: Path, wanted: Path) -> None:
    """Two runs of the tiny chain trained alike, to the bit, and were evaluated alike."""
    rows = [numbers(one / "arms/pear") for one in (run, wanted)]
    assert len(rows[0]) > 20 and rows[0] == rows[1]
    cards = [json.loads((one / "evaluate/scorecard.json").read_text())["checkpoints"] for one in (run, wanted)]
    assert cards[0].keys() == cards[1].keys()
    for label in cards[0]:
        assert cards[0][label]["pass_at_k"] == cards[1][label]["pass_at_k"]
