"""Supervised fine-tuning on the scored corpus, every token weighted by PEAR's importance ratio
(or by 1, for level "none").

Ray Data mixes the corpus and reads ahead; DeepSpeed ranks under Ray Train take the rows of one step
after another; the export is what RL starts from. The held-out loss is measured on the way: beside
`export`, the last state, stands `best`, the state with the lowest, where they differ.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from pear_ray.config import Job
from pear_ray.data.batch_queue import GRACE_SECONDS, BatchQueue, take
from pear_ray.data.loader import steps
from pear_ray.data.scored_dataset import RowGroup, refuse_too_few, row_filter, scan, sequences_of
from pear_ray.metrics import Tracker
from pear_ray.ray_cluster import connect, here
from pear_ray.records import TrainingBatch
from pear_ray.run import RunDir
from pear_ray.sft.build import objective_of
from pear_ray.sft.heldout import HeldOut
from pear_ray.sft.metrics import numbers_of, speak
from pear_ray.train.ray_train import (
    PreemptionWatcher,
    best_checkpoint,
    latest_checkpoint,
    rank_and_count,
    save_checkpoint,
    setup_worker,
    train,
)
from pear_ray.train.supported import check_supported

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner

log = logging.getLogger(__name__)

STEPS_READ_AHEAD = 4
# Learners may wait for nodes that a cloud has yet to give; `run` closes the queue when they end.
LEARNER_SECONDS = 24 * 3600.0


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Look through the corpus, then train while rows are read ahead."""
    groups = scan(job.scored_folder, row_filter(job))
    num_rows = sum(group.num_train for group in groups)
    num_heldout = sum(group.num_heldout for group in groups)
    refuse_too_few(job, groups)
    check_supported(job, job.model_path())
    connect()
    queue = BatchQueue.options(  # type: ignore[attr-defined]
        scheduling_strategy=here()
    ).remote(STEPS_READ_AHEAD)
    config = {
        "job": job.model_dump(),
        "folder": str(run.folder),
        "queue": queue,
        "groups": groups,
    }
    with ThreadPoolExecutor(1) as executor:
        fed = executor.submit(feed, job, groups, queue)
        try:
            folder = run.folder / "sft" / f"{run.folder.name}-sft"
            done = train(
                learn,
                config,
                job.learner,
                job.placement.learners,
                folder,
                keep_best=num_heldout > 0,
            )
        except Exception as error:
            if fed.done() and (cause := fed.exception()) is not None:
                raise cause from error
            raise
        finally:
            ray.get(queue.close.remote("the learners have ended"), timeout=GRACE_SECONDS)
    return done | {"examples": num_rows, "heldout_examples": num_heldout}


def feed(job: Job, groups: list[RowGroup], queue: Any) -> None:
    """The reading side: rows of one step after another, from the first that learners ask for."""
    try:
        first_step = ray.get(queue.first_wanted.remote(LEARNER_SECONDS))
        tables = steps(
            groups,
            row_filter(job),
            num_epochs=job.sft.epochs,
            rows_per_step=job.sft.examples_per_step,
            rows_per_window=job.sft.rows_per_window,
            seed=job.run.seed,
            first_step=first_step,
        )
        for step, table in enumerate(tables, first_step):
            ray.get(queue.put.remote(step, [ray.put(table)], LEARNER_SECONDS))
    except BaseException as error:
        ray.get(queue.close.remote(f"reading failed: {error!r}"), timeout=GRACE_SECONDS)
        raise


def learn(config: dict[str, Any]) -> dict[str, Any]:
    """What every rank does."""
    # The driver, which only names this function, need not wait for DeepSpeed.
    from pear_ray.train.learner import Learner

    job, folder = Job(**config["job"]), Path(config["folder"])
    setup_worker(job, "sft")
    settings, deadline = job.sft, job.learner.timeout_seconds
    rank, _ = rank_and_count()
    num_rows = settings.epochs * sum(group.num_train for group in config["groups"])
    num_steps = -(-num_rows // settings.examples_per_step)
    learner = Learner(
        job.model_path(), job.model.dtype, job.learner, settings, num_steps, job.run.seed
    )
    objective = objective_of(job, config["groups"], learner)
    heldout = HeldOut.of(job, config["groups"], learner)
    start = 0
    if (kept := latest_checkpoint()) is not None:
        kept.restore({"policy": learner}, folder / "sft")
        start, heldout = kept.notes["next_step"], heldout.after(kept.notes)
    tracker = Tracker(folder, "sft", job.tracking).rewind(start) if rank == 0 else None
    departures = PreemptionWatcher()

    def batches_of(step: int) -> list[TrainingBatch]:
        rows = take(config["queue"], step, deadline)
        distils = settings.objective == "kl"
        return learner.share(sequences_of(rows, settings.negative_coefficient, distils))

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(batches_of, start)
        for step in range(start, num_steps):
            batches = coming.result()
            if step + 1 < num_steps:
                coming = ahead.submit(batches_of, step + 1)
            result = learner.step(batches, objective)
            is_last = step + 1 == num_steps
            is_due = (step + 1) % job.learner.save_every == 0 and not is_last
            if is_due or is_last or (step + 1) % settings.eval_every == 0:
                heldout = heldout.measured(learner)
            if tracker:
                tracker.log(step, **numbers_of(job, result), **heldout.numbers)
                speak(step, num_steps, numbers_of(job, result), heldout)
            if departures.any_new() or is_due:
                safe_step = save_checkpoint(
                    {"policy": learner}, step + 1, deadline, **heldout.numbers
                )
                ray.get(config["queue"].forget_before.remote(safe_step), timeout=deadline)
    learner.export(folder / "sft" / "export", job.model_path())
    export_best(learner, folder / "sft", job, heldout)
    if tracker:
        tracker.close()
    return {"steps": num_steps} | heldout.numbers


def export_best(learner: Learner, folder: Path, job: Job, last: HeldOut) -> None:
    """Write `best` where a checkpoint has a lower held-out loss than the last state."""
    kept = best_checkpoint(job.learner.timeout_seconds)
    # A last loss that is not a number is no better.
    if kept is not None and not kept.notes["heldout_loss"] >= last.loss:
        kept.restore({"policy": learner}, folder)
        learner.export(folder / "best", job.model_path())
