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
from typing import TYPE_CHECKING, Any

import ray

from pear_ray.config import Job
from pear_ray.data.batch_queue import GRACE_SECONDS, BatchQueue, take_batch
from pear_ray.data.scored_dataset import (
    RowFilter,
    RowGroup,
    batches,
    check_enough_rows,
    scan_dataset,
    training_sequences,
)
from pear_ray.metrics import Tracker
from pear_ray.records import TrainingBatch
from pear_ray.run import RunDir, connect, this_node_only
from pear_ray.sft.loss import HeldOut, build_sft_loss, log_step, step_metrics
from pear_ray.train.hf_folder import check_supported
from pear_ray.train.ray_train import (
    PreemptionWatcher,
    best_checkpoint,
    latest_checkpoint,
    rank_and_world_size,
    run_ray_train,
    save_checkpoint,
    setup_worker,
)

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner

STEPS_READ_AHEAD = 4
# Learners may wait for nodes that a cloud has yet to add; `run` closes the queue when they end.
LEARNER_TIMEOUT_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class SftInputs:
    """Everything the driver passes to the ranks. Example: SftInputs(job, Path("runs/a"),
    [RowGroup("runs/a/scored/0.parquet", 0, 960, 40, ("teacher",))], queue)"""

    job: Job
    run_dir: Path
    groups: list[RowGroup]
    queue: Any
    """Handle of the `BatchQueue` actor."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps over all epochs; the last one may have fewer rows."""
        num_rows = self.job.sft.epochs * sum(group.num_train for group in self.groups)
        return -(-num_rows // self.job.sft.examples_per_step)


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Scan the corpus, then train while rows are read ahead."""
    groups = scan_dataset(job.scored_folder, RowFilter.from_job(job))
    num_heldout = sum(group.num_heldout for group in groups)
    check_enough_rows(job, groups)
    check_supported(job, job.model_path())
    connect()
    queue = BatchQueue.options(  # type: ignore[attr-defined]
        scheduling_strategy=this_node_only()
    ).remote(STEPS_READ_AHEAD)
    with ThreadPoolExecutor(1) as executor:
        feeding = executor.submit(feed_rows, job, groups, queue)
        try:
            result = run_ray_train(
                train_loop,
                SftInputs(job, run.folder, groups, queue),
                job.learner,
                job.placement.learners,
                run.folder / "sft" / f"{run.folder.name}-sft",
                keep_best=num_heldout > 0,
            )
        except Exception as error:
            if feeding.done() and (cause := feeding.exception()) is not None:
                raise cause from error
            raise
        finally:
            ray.get(queue.close.remote("the learners have ended"), timeout=GRACE_SECONDS)
    num_examples = sum(group.num_train for group in groups)
    return result | {"examples": num_examples, "heldout_examples": num_heldout}


def feed_rows(job: Job, groups: list[RowGroup], queue: Any) -> None:
    """Put each step's rows into the queue, from the first step that learners request."""
    try:
        first_step = ray.get(queue.first_requested.remote(LEARNER_TIMEOUT_SECONDS))
        tables = batches(
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
    setup_worker(job, "sft")
    settings, timeout_seconds = job.sft, job.learner.timeout_seconds
    learner = Learner(job.model_path(), job.model.dtype, job.learner, settings, num_steps, job.run.seed)
    loss = build_sft_loss(job, inputs.groups, learner)
    heldout = HeldOut.create(job, inputs.groups, learner)
    first_step = 0
    checkpoint = latest_checkpoint()
    if checkpoint is not None:
        checkpoint.restore({"policy": learner}, folder)
        first_step = checkpoint.metadata["next_step"]
        heldout = heldout.resume(checkpoint.metadata)
    rank, _ = rank_and_world_size()
    tracker = Tracker(inputs.run_dir, "sft", job.tracking).rewind(first_step) if rank == 0 else None
    preemptions = PreemptionWatcher()

    def load(step: int) -> list[TrainingBatch]:
        rows = take_batch(inputs.queue, step, timeout_seconds)
        with_teacher = settings.objective.type == "kl"
        sequences = training_sequences(rows, settings.negative_coefficient, with_teacher)
        return learner.micro_batches(sequences)

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
                resume_step = save_checkpoint({"policy": learner}, step + 1, timeout_seconds, **heldout.metrics)
                ray.get(inputs.queue.drop_before.remote(resume_step), timeout=timeout_seconds)
    learner.export(folder / "export", job.model_path())
    export_best(learner, folder, job, heldout)
    if tracker:
        tracker.close()
    return {"steps": num_steps} | heldout.metrics


def export_best(learner: Learner, folder: Path, job: Job, heldout: HeldOut) -> None:
    """Export `best` if a checkpoint has a lower held-out loss than the last weights."""
    best = best_checkpoint(job.learner.timeout_seconds)
    # Not `<`: any measured checkpoint is better than a last loss of NaN.
    if best is not None and not best.metadata["heldout_loss"] >= heldout.loss:
        best.restore({"policy": learner}, folder)
        learner.export(folder / "best", job.model_path())
