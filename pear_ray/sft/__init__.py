"""Supervised fine-tuning on the scored corpus; every token is weighted by PEAR's importance ratio (by 1 for level
"none").

    driver: feed_rows                            ranks: train_loop (DeepSpeed under Ray Train)

    scored corpus                                each rank packs its share of a step's rows,
      Ray Data shuffles windows of rows            takes an optimizer step, and logs it
      one table per step ----> BatchQueue ---->  every eval_every steps: held-out loss
            (4 steps ahead)        ^             every save_every steps: checkpoint
                                   '--- drop steps before the latest committed checkpoint

The last weights become `export`, which `rl` starts from; if an earlier checkpoint has a lower held-out loss, it becomes
`best`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from pear_ray.config import Job
from pear_ray.data import scored_dataset
from pear_ray.data.batch_queue import GRACE_SECONDS, BatchQueue, take_batch
from pear_ray.data.scored_dataset import RowFilter, RowGroup
from pear_ray.metrics import Tracker
from pear_ray.records import TrainingBatch
from pear_ray.run import RunDir, connect, this_node_only
from pear_ray.sft.loss import HeldOut, build_sft_loss, log_step, step_metrics
from pear_ray.train import ray_train
from pear_ray.train.hf_folder import check_supported

STEPS_READ_AHEAD = 4
# Learners may wait for nodes that a cloud has yet to add; `run` closes the queue when they end.
LEARNER_TIMEOUT_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class SftInputs:
    """Everything the driver passes to the ranks; `queue` is a handle of the `BatchQueue` actor. Example: SftInputs(job,
    Path("runs/a"), [RowGroup("runs/a/scored/0.parquet", 0, 960, 40, ("teacher",))], 15, queue)"""

    job: Job
    run_dir: Path
    groups: list[RowGroup]
    num_steps: int
    queue: Any


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Scan the corpus, then train while rows are read ahead."""
    groups = scored_dataset.scan_dataset(job.scored_folder, RowFilter.from_job(job))
    num_examples, num_heldout = sum(g.num_train for g in groups), sum(g.num_heldout for g in groups)
    scored_dataset.check_enough_rows(job, groups)
    check_supported(job, job.model_path())
    connect()
    queue = BatchQueue.options(scheduling_strategy=this_node_only()).remote(STEPS_READ_AHEAD)  # type: ignore[attr-defined]
    # The last step may have fewer rows.
    num_steps = -(-job.sft.epochs * num_examples // job.sft.examples_per_step)
    inputs = SftInputs(job, run.folder, groups, num_steps, queue)
    storage = run.folder / "sft" / f"{run.folder.name}-sft"
    with ThreadPoolExecutor(1) as executor:
        feeding = executor.submit(feed_rows, job, groups, queue)
        try:
            result = ray_train.run_ray_train(
                train_loop, inputs, job.learner, job.placement.learners, storage, keep_best=num_heldout > 0
            )
        except Exception as error:
            if feeding.done() and (cause := feeding.exception()) is not None:
                raise cause from error
            raise
        finally:
            ray.get(queue.close.remote("the learners have ended"), timeout=GRACE_SECONDS)
    return result | {"examples": num_examples, "heldout_examples": num_heldout}


def feed_rows(job: Job, groups: list[RowGroup], queue: Any) -> None:
    """Put each step's rows into the queue, from the first step that learners request."""
    try:
        first_step = ray.get(queue.first_requested.remote(LEARNER_TIMEOUT_SECONDS))
        tables = scored_dataset.batches(
            groups,
            RowFilter.from_job(job),
            num_epochs=job.sft.epochs,
            rows_per_step=job.sft.examples_per_step,
            rows_per_window=job.sft.rows_per_window,
            seed=job.run.seed,
            first_step=first_step,
        )
        for step, table in enumerate(tables, first_step):
            ray.get(queue.put.remote(step, [ray.put(table)], LEARNER_TIMEOUT_SECONDS))
    except BaseException as error:
        ray.get(queue.close.remote(f"reading rows failed: {error!r}"), timeout=GRACE_SECONDS)
        raise


def train_loop(inputs: SftInputs) -> dict[str, Any]:
    """Train on one rank: take a step's rows, learn, measure, save; export at the end."""
    # Imported here because DeepSpeed takes seconds, and the driver only names this function.
    from pear_ray.train.learner import Learner

    job, folder, num_steps = inputs.job, inputs.run_dir / "sft", inputs.num_steps
    ray_train.setup_worker(job, "sft")
    settings, timeout_seconds = job.sft, job.learner.timeout_seconds
    learner = Learner(job.model_path(), job.model.dtype, job.learner, settings, num_steps, job.run.seed)
    loss = build_sft_loss(job, inputs.groups, learner)
    heldout = HeldOut.create(job, inputs.groups, learner)
    learners, first_step = {"policy": learner}, 0
    if checkpoint := ray_train.latest_checkpoint():
        checkpoint.restore(learners, folder)
        first_step = checkpoint.metadata["next_step"]
        heldout = heldout.resume(checkpoint.metadata)
    rank, _ = ray_train.rank_and_world_size()
    tracker = Tracker(inputs.run_dir, "sft", job.tracking).rewind(first_step) if rank == 0 else None
    preemptions = ray_train.PreemptionWatcher()

    def load(step: int) -> list[TrainingBatch]:
        rows = take_batch(inputs.queue, step, timeout_seconds)
        is_kl = settings.objective.type == "kl"
        return learner.micro_batches(scored_dataset.training_sequences(rows, settings.negative_coefficient, is_kl))

    with ThreadPoolExecutor(1) as executor:
        next_batches = executor.submit(load, first_step)
        for step in range(first_step, num_steps):
            step_batches = next_batches.result()
            if step + 1 < num_steps:
                next_batches = executor.submit(load, step + 1)
            result = learner.step(step_batches, loss)
            is_last = step + 1 == num_steps
            is_save_due = (step + 1) % job.learner.save_every == 0 and not is_last
            if is_save_due or is_last or (step + 1) % settings.eval_every == 0:
                heldout = heldout.measure(learner)
            if tracker:
                metrics = step_metrics(job, result)
                tracker.log(step, **metrics, **heldout.metrics)
                log_step(step, num_steps, metrics, heldout)
            if preemptions.any_new() or is_save_due:
                resume_step = ray_train.save_checkpoint(learners, step + 1, timeout_seconds, **heldout.metrics)
                ray.get(inputs.queue.drop_before.remote(resume_step), timeout=timeout_seconds)
    learner.export(folder / "export", job.model_path())
    best = ray_train.best_checkpoint(timeout_seconds)
    # Not `<`: any measured checkpoint is better than a last loss of NaN.
    if best is not None and not best.metadata["heldout_loss"] >= heldout.loss:
        best.restore(learners, folder)
        learner.export(folder / "best", job.model_path())
    if tracker:
        tracker.close()
    return {"steps": num_steps} | heldout.metrics
