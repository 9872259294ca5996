"""Learner ranks as a Ray Train run: start them, restart them, and where they go on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointConsistencyMode,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from pear_ray.config import Job
from pear_ray.config import Learner as Settings
from pear_ray.logs import LOG_CONTEXT, configure_logging

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner

log = logging.getLogger(__name__)

HELDOUT = "heldout_loss"
# Ray Train gives up an attempt to start all ranks after so many seconds, and begins another.
START_SECONDS = 60.0


def train(
    loop: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    settings: Settings,
    labels: dict[str, str],
    folder: Path,
    keep_best: bool = False,
) -> Any:
    """Run `loop(config)` on every rank, on nodes with these `labels`, and return what rank 0
    returns.

    A run which was cut off, by the death of a rank or of the driver, goes on from its newest
    checkpoint below `folder`. With `keep_best` the checkpoint with the lowest held-out loss stays
    beside the newest.

    Raises:
        TimeoutError: the ranks did not start in `settings.timeout_seconds` and a little more, for
            want of resources.
    """
    attempt_seconds = min(START_SECONDS, settings.timeout_seconds)
    # Attempts on the whole run: also a node that dies under a rank which is starting costs one.
    num_attempts = int(settings.timeout_seconds / attempt_seconds) + settings.max_failures
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(attempt_seconds)
    worker = {"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.use_gpu else {})
    most, fewest = settings.num_workers, settings.min_workers
    best_checkpoint = {"checkpoint_score_attribute": HELDOUT, "checkpoint_score_order": "min"}
    trainer = TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=most if fewest in (None, most) else (fewest, most),
            use_gpu=settings.use_gpu,
            resources_per_worker=worker,
            label_selector=labels or None,
        ),
        torch_config=TorchConfig(
            backend="nccl" if settings.use_gpu else "gloo",
            timeout_s=int(settings.timeout_seconds),
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=FailureConfig(
                max_failures=settings.max_failures,
                controller_failure_limit=num_attempts - 1,
            ),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, **(best_checkpoint if keep_best else {})
            ),
        ),
    )
    try:
        return trainer.fit().return_value
    except ray.train.ControllerError as error:
        if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise
        raise TimeoutError(no_room(settings, worker, labels)) from error


def no_room(settings: Settings, worker: dict[str, float], labels: dict[str, str]) -> str:
    """What was waited for in vain, and what there is of it."""
    total, free = ray.cluster_resources(), ray.available_resources()
    there = ", ".join(
        f"{total.get(name, 0.0):g} {name} ({free.get(name, 0.0):g} free)" for name in worker
    )
    return (
        f"waited more than {settings.timeout_seconds:.0f} s (learner.timeout_seconds) for"
        f" {settings.min_workers or settings.num_workers} ranks with {worker} each"
        f"{f' on nodes with labels {labels}' if labels else ''}; the cluster"
        f" has {there}"
    )


def rank_and_count() -> tuple[int, int]:
    """This rank's number, and how many there are."""
    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size()


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint: the folder that holds it, below which every rank has its part, and what was
    noted beside it: `next_step`, `num_ranks`, and the metrics given to `keep`."""

    folder: Path
    notes: dict[str, Any]

    def restore(self, learners: Mapping[str, Learner], scratch: Path) -> None:
        """Bring the learners there, by the names that they were kept under; every rank calls this.
        What another number of ranks wrote is converted to a form for any number below `scratch`, a
        folder that all ranks see."""
        for name, learner in learners.items():
            self._restore(name, learner, scratch)

    def _restore(self, name: str, learner: Learner, scratch: Path) -> None:
        rank, num_ranks = rank_and_count()
        # Under stage 0 nothing is partitioned: every rank has written everything.
        is_whole = not any((self.folder / name / "state").glob("*optim_states.pt"))
        if self.notes["num_ranks"] == num_ranks or is_whole:
            learner.load(self.folder / name)
            return
        universal = scratch / f"universal-{self.notes['next_step']}"
        if rank == 0:
            from pear_ray.train.zero import to_universal

            shutil.rmtree(universal, ignore_errors=True)
            to_universal(self.folder / name, universal)
        torch.distributed.barrier()
        learner.load(universal, universal=True)
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(universal)


def latest_checkpoint() -> CheckpointRef | None:
    """The checkpoint that the run goes on from, if there is any."""
    checkpoint = ray.train.get_checkpoint()
    return None if checkpoint is None else read_kept(Path(checkpoint.path))


def best_checkpoint(timeout_seconds: float) -> CheckpointRef | None:
    """The checkpoint with the lowest held-out loss, if any was measured; the same on all ranks."""
    chosen: list[str | None] = [None]
    if rank_and_count()[0] == 0:
        reported = ray.train.get_all_reported_checkpoints(
            CheckpointConsistencyMode.COMMITTED, timeout_seconds
        )
        measured = [found for found in reported if HELDOUT in found.metrics]
        if measured:
            found = min(measured, key=lambda found: found.metrics[HELDOUT])
            chosen = [found.checkpoint.path]
    torch.distributed.broadcast_object_list(chosen)
    (path,) = chosen
    return None if path is None else read_kept(Path(path))


def read_kept(folder: Path) -> CheckpointRef:
    """What Ray Train knows as a checkpoint. A run's storage is a folder that all nodes see."""
    return CheckpointRef(folder, json.loads((folder / "progress.json").read_text()))


def save_checkpoint(
    learners: Mapping[str, Learner], next_step: int, timeout_seconds: float, **metrics: float
) -> int:
    """Write a checkpoint, of which each rank holds its part, each learner's below its name. It is
    copied to the run's storage while the next steps run.

    Returns:
        The step from which a run that is cut off now goes on at the earliest: that of the
        checkpoint before, which is in its place by now.
    """
    # What was reported is forgotten if a rank dies before Ray Train's controller has seen it.
    committed = ray.train.get_all_reported_checkpoints(
        CheckpointConsistencyMode.COMMITTED, timeout_seconds
    )
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    for name, learner in learners.items():
        learner.save(folder / name)
    notes = {"next_step": next_step, "num_ranks": rank_and_count()[1], **metrics}
    (folder / "progress.json").write_text(json.dumps(notes))
    ray.train.report(
        notes,
        checkpoint=Checkpoint.from_directory(str(folder)),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
    )
    return max((found.metrics["next_step"] for found in committed), default=0)


class PreemptionWatcher:
    """Nodes of the run that are going to be taken back, as Ray tells of it."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        # Where nobody watches, asking would cost each step a message for nothing.
        self._are_watched = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"

    def any_new(self) -> bool:
        """Whether another one was announced: time for a checkpoint. Every rank asks after every
        step, and all hear the same."""
        notice = ray.train.get_preemption_info() if self._are_watched else None
        new = set(notice.preempted_node_ids) - self._known if notice else set()
        self._known |= new
        if new:
            log.warning("nodes are going to be taken back: %s", ", ".join(sorted(new)))
        return bool(new)


def setup_worker(job: Job, stage: str) -> None:
    """Settle a rank's process: one compute thread per CPU, since ranks that share cores wait on
    each other, and log lines that reach the job's log."""
    configure_logging(job.tracking.logs)
    LOG_CONTEXT.set(str(job.folder.absolute()), stage)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
