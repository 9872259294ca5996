"""Learner ranks as a Ray Train run: start them, restart them, and where they go on."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointConsistencyMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer

from pear_ray.config import Learner as Settings

if TYPE_CHECKING:
    from pear_ray.engines.learner import Learner


def train(
    loop: Callable[[dict[str, Any]], Any], config: dict[str, Any], settings: Settings, folder: Path
) -> Any:
    """Run `loop(config)` on every rank and return what rank 0 returns.

    A run which was cut off, by the death of a rank or of the driver, goes on from its newest
    checkpoint below `folder`.
    """
    worker = {"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.use_gpu else {})
    trainer = TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.use_gpu,
            resources_per_worker=worker,
        ),
        torch_config=TorchConfig(
            backend="nccl" if settings.use_gpu else "gloo",
            timeout_s=int(settings.deadline_seconds),
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    return trainer.fit().return_value


def rank_and_count() -> tuple[int, int]:
    """This rank's number, and how many there are."""
    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size()


def restore(learner: Learner) -> int:
    """Bring the learner to the newest checkpoint of the run; returns the step to go on with."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        learner.load(Path(folder))
        return json.loads((Path(folder) / "progress.json").read_text())["next_step"]


def keep(learner: Learner, next_step: int, deadline_seconds: float) -> None:
    """Write a checkpoint, of which each rank holds its part. When this returns, a run that is cut
    off goes on from here at the earliest."""
    with tempfile.TemporaryDirectory() as folder:
        learner.save(Path(folder))
        (Path(folder) / "progress.json").write_text(json.dumps({"next_step": next_step}))
        ray.train.report({"next_step": next_step}, checkpoint=Checkpoint.from_directory(folder))
    # What was reported is forgotten if a rank dies before Ray Train's controller has seen it.
    ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED, deadline_seconds)


def begin() -> None:
    """Settle a rank's process: one compute thread per CPU, since ranks that share cores wait on
    each other, and log lines that reach the job's log."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
