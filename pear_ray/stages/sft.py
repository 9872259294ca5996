"""Supervised fine-tuning on the scored corpus, every token weighted by PEAR's importance ratio
(or by 1, for level "none"). DeepSpeed ZeRO-3 ranks under Ray Train; the export is what RL starts
from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_ray.actors.cluster import connect
from pear_ray.actors.training import begin, keep, rank_and_count, restore, train
from pear_ray.algorithms.objectives import Nll, Objective, PearNll
from pear_ray.algorithms.packing import pack
from pear_ray.algorithms.seeds import seed_of
from pear_ray.algorithms.statistics import weight_summary
from pear_ray.config import BadInput, Job
from pear_ray.engines.tokenizer import digests, load_tokenizer
from pear_ray.manifest import Run
from pear_ray.records import TrainingSequence
from pear_ray.tracking import Tracker

if TYPE_CHECKING:
    from pear_ray.engines.learner import StepResult

log = logging.getLogger(__name__)


def run(job: Job, run: Run) -> dict[str, Any]:
    """Check the corpus, then train."""
    num_examples = check_corpus(job)
    if num_examples < job.sft.examples_per_step:
        raise BadInput(
            f"sft.examples_per_step: read {job.sft.examples_per_step}; {job.scored_folder} holds"
            f" {num_examples} training rows; expected at most as many"
        )
    connect()
    config = {"job": job.model_dump(), "folder": str(run.folder)}
    return train(learn, config, job.learner, run.folder / "sft" / f"{run.folder.name}-sft")


def learn(config: dict[str, Any]) -> dict[str, Any]:
    """What every rank does."""
    # The driver, which only names this function, need not wait for DeepSpeed.
    from pear_ray.engines.learner import Learner

    begin()
    job, folder = Job(**config["job"]), Path(config["folder"])
    rank, num_ranks = rank_and_count()
    settings = job.sft
    corpus = read_scored(job.scored_folder, "train")
    steps_per_epoch = len(corpus) // settings.examples_per_step
    num_steps = settings.epochs * steps_per_epoch
    learner = Learner(
        job.model_path(), job.model.dtype, job.learner, settings, num_steps, job.run.seed
    )
    start = restore(learner)
    tracker = Tracker(folder, "sft", job.tracking).rewind(start) if rank == 0 else None
    sources = tuple(sorted({sequence.origin for sequence in corpus}))
    objective = objective_of(job, sources)
    for step in range(start, num_steps):
        epoch, place = divmod(step, steps_per_epoch)
        order = np.random.default_rng(seed_of(job.run.seed, "sft", epoch)).permutation(len(corpus))
        members = order[place * settings.examples_per_step :][: settings.examples_per_step]
        batches = pack([corpus[i] for i in members], num_ranks, job.learner.tokens_per_micro_batch)[
            rank
        ]
        result = learner.step(batches, objective)
        if tracker:
            tracker.log(step, **numbers_of(job, result))
            if step % 10 == 0 or step + 1 == num_steps:
                log.info("sft: step %d of %d: loss %.4f", step + 1, num_steps, result.loss)
        if (step + 1) % job.learner.steps_per_checkpoint == 0 and step + 1 < num_steps:
            keep(learner, step + 1, job.learner.deadline_seconds)
    learner.export(folder / "sft" / "export", job.model_path())
    if tracker:
        tracker.close()
    return {"steps": num_steps, "examples": len(corpus)}


def objective_of(job: Job, sources: tuple[str, ...]) -> Objective:
    """Plain or weighted negative log-likelihood."""
    settings = job.sft
    if settings.level == "none":
        return Nll()
    return PearNll(
        settings.level,
        settings.discount,
        settings.block_size,
        settings.clip_log_ratio,
        settings.clip_log_weight,
        sources,
    )


def numbers_of(job: Job, result: StepResult) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    numbers = {
        "loss": result.loss,
        "nll": float(result.facts["nll"]) / result.num_tokens,
        "entropy": float(result.facts["entropy"]) / result.num_tokens,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "num_tokens": result.num_tokens,
    }
    if job.sft.level == "none":
        return numbers
    return numbers | weight_summary(result.facts, result.num_tokens, job.sft.clip_log_weight)


def check_corpus(job: Job) -> int:
    """How many training rows there are.

    Raises:
        BadInput: there is no scored corpus, or it was tokenised otherwise than this model's.
    """
    folder = job.scored_folder
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise BadInput(f"{folder}: holds no .parquet file; expected what stage `score` writes")
    ours = digests(load_tokenizer(job.model_path()))
    num_rows = 0
    for file in files:
        columns = ["tokenizer_digest", "template_digest", "split", "behaviour_logprobs"]
        table = pq.read_table(file, columns=columns)
        logprobs = table.column("behaviour_logprobs").combine_chunks().flatten()
        if not pc.all(pc.is_finite(logprobs)).as_py():
            raise BadInput(f"{file}: behaviour_logprobs: read a NaN or infinity; expected numbers")
        digest_columns = table.select(["tokenizer_digest", "template_digest"])
        theirs = {tuple(row.values()) for row in digest_columns.to_pylist()}
        if theirs != {ours}:
            raise BadInput(
                f"{file}: tokenizer_digest, template_digest: read {sorted(theirs)}; expected"
                f" {ours}, those of {job.model_path()}"
            )
        num_rows += table.column("split").to_pylist().count("train")
    return num_rows


def read_scored(folder: Path, split: str) -> list[TrainingSequence]:
    """The rows of a split as training sequences, in the order of `example_id`."""
    rows = [row for file in folder.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    return [
        TrainingSequence.of(
            row["prompt_ids"],
            row["response_ids"],
            row["behaviour_logprobs"],
            1.0,
            row["source"],
            row.get("trainable"),
        )
        for row in sorted(rows, key=lambda row: row["example_id"])
        if row["split"] == split
    ]
