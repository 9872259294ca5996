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
        time.sleep(0.5)


def with_corpus_of(tiny_run: Path, run: Path) -> Path:
    """Make a run folder whose models and corpus are those of a finished run: stages `pretrain` and `sample` are done,
    all others still to do."""
    done = ("pretrain", "sample")
    for outputs in done:
        shutil.copytree(tiny_run / outputs, run / outputs)
    shutil.copy(tiny_run / "config.json", run)
    write_manifest(tiny_run, run, done)
    return run


def with_sft_of(tiny_run: Path, run: Path, **sections: dict[str, Any]) -> Path:
    """Make a run folder in which stage `sft` is that of arm `pear` of a finished run, and `rl` still to do. Return its
    job, with these keys in its sections."""
    arm = tiny_run / "arms/pear"
    shutil.copytree(arm / "sft", run / "sft")
    write_manifest(arm, run, ("sft",))
    job = json.loads((arm / "config.json").read_text())
    sections |= {"run": {"dir": str(run)}}
    path = run / "config.json"
    path.write_text(json.dumps(job | {name: job[name] | keys for name, keys in sections.items()}))
    return path


def write_manifest(finished: Path, run: Path, done: tuple[str, ...]) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    manifest["stages"] = {name: manifest["stages"][name] for name in done}
    (run / "manifest.json").write_text(json.dumps(manifest))


def numbers(folder: Path, stages: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of the stages' metrics without what clocks say."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    clocks = re.compile("time|seconds|per_second|num_engines")
    return [{k: v for k, v in row.items() if not clocks.search(k)} for row in rows if row["stage"] in stages]


def assert_trained_alike(run: Path, wanted: Path, stages: tuple[str, ...]) -> None:
    """The stages of two runs have the same metrics, to the bit."""
    ours, theirs = numbers(run, stages), numbers(wanted, stages)
    assert {row["stage"] for row in ours} == set(stages) and ours == theirs


def assert_evaluated_alike(run: Path, wanted: Path) -> None:
    cards = [json.loads((one / "evaluate/scorecard.json").read_text())["checkpoints"] for one in (run, wanted)]
    assert cards[0].keys() == cards[1].keys()
    for label in cards[0]:
        assert cards[0][label]["pass_at_k"] == cards[1][label]["pass_at_k"]
