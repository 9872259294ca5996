"""Learner ranks as a Ray Train run: start and restart them, save and find their checkpoints."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from pear_ray.config import Job
from pear_ray.config import Learner as LearnerConfig
from pear_ray.process import LOG_CONTEXT, configure_logging

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner

log = logging.getLogger(__name__)

BEST_METRIC = "heldout_loss"
# Longest attempt to start all ranks, after which Ray Train begins another.
START_SECONDS = 60.0

Inputs = TypeVar("Inputs")


def run_ray_train(
    train_loop: Callable[[Inputs], dict[str, Any]],
    inputs: Inputs,
    config: LearnerConfig,
    labels: dict[str, str],
    folder: Path,
    keep_best: bool = False,
) -> dict[str, Any]:
    """Run `train_loop(inputs)` on every rank, on nodes with these `labels`; return rank 0's result. Raise TimeoutError
    if the cluster had no room for the ranks within about `config.timeout_seconds`.

    A run cut off by the death of a rank or of the driver resumes from its latest checkpoint below `folder`. With
    `keep_best` the checkpoint with the lowest held-out loss stays beside the latest.
    """
    attempt_seconds = min(START_SECONDS, config.timeout_seconds)
    # Over the whole run: a node that dies under a starting rank costs an attempt too.
    num_attempts = int(config.timeout_seconds / attempt_seconds) + config.max_failures
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(attempt_seconds)
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.use_gpu else {})
    most, fewest = config.num_workers, config.min_workers
    best = {"checkpoint_score_attribute": BEST_METRIC, "checkpoint_score_order": "min"} if keep_best else {}
    trainer = TorchTrainer(
        partial(train_loop, inputs),
        scaling_config=ray.train.ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=config.use_gpu,
            resources_per_worker=resources,
            label_selector=labels or None,
        ),
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo", timeout_s=int(config.timeout_seconds)),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=ray.train.FailureConfig(config.max_failures, controller_failure_limit=num_attempts - 1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2, **best),
        ),
    )
    try:
        return trainer.fit().return_value
    except ray.train.ControllerError as error:
        if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise
        total, free = ray.cluster_resources(), ray.available_resources()
        present = ", ".join(f"{total.get(name, 0.0):g} {name} ({free.get(name, 0.0):g} free)" for name in resources)
        where = f" on nodes with labels {labels}" if labels else ""
        raise TimeoutError(
            f"learner.timeout_seconds: expected {fewest} ranks with {resources} each{where} to start within"
            f" {config.timeout_seconds:.0f} s; the cluster has {present}"
        ) from error


def rank_and_world_size() -> tuple[int, int]:
    """Return this rank's number and the number of ranks."""
    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size()


@dataclass(frozen=True)
class CheckpointRef:
    """A saved checkpoint: a folder that holds every rank's part, and its metadata. Example:

    CheckpointRef(Path("runs/a/sft/a-sft/checkpoint_3"), {"next_step": 150, "num_ranks": 8, "heldout_loss": 0.71})
    """

    folder: Path
    metadata: dict[str, Any]

    @classmethod
    def open(cls, folder: str) -> CheckpointRef:
        """Read the metadata of a checkpoint in the run's storage, which all nodes share."""
        return cls(Path(folder), json.loads((Path(folder) / "progress.json").read_text()))

    def restore(self, learners: Mapping[str, Learner], scratch: Path) -> None:
        """Load each learner by its name in the checkpoint; collective. A checkpoint of another number of ranks is
        converted to the universal format below `scratch`, a shared folder."""
        from pear_ray.train.learner import write_universal_checkpoint

        rank, num_ranks = rank_and_world_size()
        universal = scratch / f"universal-{self.metadata['next_step']}"
        for name, learner in learners.items():
            # ZeRO stage 0 partitions nothing: every rank has written everything.
            is_whole = not any((self.folder / name / "state").glob("*optim_states.pt"))
            if self.metadata["num_ranks"] == num_ranks or is_whole:
                learner.load(self.folder / name)
                continue
            if rank == 0:
                shutil.rmtree(universal, ignore_errors=True)
                write_universal_checkpoint(self.folder / name, universal)
            torch.distributed.barrier()
            learner.load(universal, universal=True)
            torch.distributed.barrier()
            if rank == 0:
                shutil.rmtree(universal)


def latest_checkpoint() -> CheckpointRef | None:
    """Return the checkpoint that the run resumes from, if any."""
    checkpoint = ray.train.get_checkpoint()
    return None if checkpoint is None else CheckpointRef.open(checkpoint.path)


def best_checkpoint(timeout_seconds: float) -> CheckpointRef | None:
    """Return the checkpoint with the lowest held-out loss, if any was measured; collective."""
    best_path: list[str | None] = [None]
    if rank_and_world_size()[0] == 0 and (best := best_report(committed_checkpoints(timeout_seconds))):
        best_path = [best.checkpoint.path]
    torch.distributed.broadcast_object_list(best_path)
    return None if best_path[0] is None else CheckpointRef.open(best_path[0])


def best_report(reports: Iterable[Any]) -> Any | None:
    """Return the report with the lowest held-out loss, the first of equal ones; None if none was measured."""
    measured = [report for report in reports if BEST_METRIC in report.metrics]
    return min(measured, key=lambda report: report.metrics[BEST_METRIC], default=None)


def committed_checkpoints(timeout_seconds: float) -> list[Any]:
    """Return Ray Train's reports of all checkpoints, once the latest is in the run's storage."""
    return ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED, timeout_seconds)


def save_checkpoint(learners: Mapping[str, Learner], next_step: int, timeout_seconds: float, **metrics: float) -> int:
    """Save every learner below its name; collective. The upload overlaps the next steps. Return the earliest step from
    which the run can resume if cut off now: that of the previous checkpoint, which is committed by now."""
    # Wait for it: a report is lost if a rank dies before Ray Train's controller has seen it.
    committed = committed_checkpoints(timeout_seconds)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    for name, learner in learners.items():
        learner.save(folder / name)
    metadata = {"next_step": next_step, "num_ranks": rank_and_world_size()[1], **metrics}
    (folder / "progress.json").write_text(json.dumps(metadata))
    checkpoint = ray.train.Checkpoint.from_directory(str(folder))
    ray.train.report(metadata, checkpoint, checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC)
    return max((report.metrics["next_step"] for report in committed), default=0)


class PreemptionWatcher:
    """Ray's notices that nodes of the run are about to be preempted."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        # Without Ray's watcher, polling would only cost each step a message.
        self._is_enabled = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"

    def any_new(self) -> bool:
        """Return whether another node was announced since the last poll, the same on every rank: save a checkpoint."""
        notice = ray.train.get_preemption_info() if self._is_enabled else None
        new = set(notice.preempted_node_ids) - self._seen if notice else set()
        self._seen |= new
        if new:
            log.warning("nodes will be preempted: %s", ", ".join(sorted(new)))
        return bool(new)


def setup_worker(job: Job, stage: str) -> None:
    """Configure a rank's process: logging, and a thread per CPU, since ranks that share cores wait on each other."""
    configure_logging(job.tracking.logs)
    LOG_CONTEXT.update(run=str(job.folder.absolute()), stage=stage)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
