"""pass@k of the run's checkpoints on held-out problems, with intervals over problems.

Every checkpoint answers the same problems with the same seeds, so that two of them are compared
pair by pair. Interrupted, the same command samples what is missing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.config import TRAINING_STAGES, Job, start_of
from pear_ray.data.tokenizer import encode_problems
from pear_ray.engines.engine_pool import EnginePool
from pear_ray.evaluate.attempts import Store, attempt, requests
from pear_ray.evaluate.likelihood import heldout_nll, heldout_rows, kl_from
from pear_ray.evaluate.scorecard import card, scorecard
from pear_ray.ray_cluster import connect
from pear_ray.records import Problem
from pear_ray.rewards.pool import RewardPool
from pear_ray.run import RunDir, write_json
from pear_ray.score.shards import name_of
from pear_ray.tasks import heldout_problems

log = logging.getLogger(__name__)

# What a checkpoint's engine says of other answers, written when all else of it is there.
LIKELIHOOD = "likelihood.json"


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Evaluate the model the run starts from and every export of it and of its arms."""
    checkpoints = checkpoints_of(job, run.folder)
    problems = heldout_problems(job.tasks, job.evaluation.num_problems, job.run.seed)
    sampled_how = {
        "samples_per_problem": job.evaluation.samples_per_problem,
        "temperature": job.evaluation.temperature,
        "max_new_tokens": job.generator.max_new_tokens,
        "seed": job.run.seed,
        "problems": [problem.problem_id for problem in problems],
    }
    with run.resumable_folder("evaluate", sampled_how) as folder:
        # Weights that were trained again since are another checkpoint.
        homes = {
            label: folder / "attempts" / name_of(f"{label} {path} {written(path)}")
            for label, path in checkpoints.items()
        }
        sample_all(job, run, checkpoints, problems, homes)
        tables = {label: Store(home).table(problems) for label, home in homes.items()}
        cards = {
            label: card(job, path, tables[label])
            | json.loads((homes[label] / LIKELIHOOD).read_text())
            for label, path in checkpoints.items()
        }
        for label, found in cards.items():
            log.info("evaluate: %s: %s", label, in_words(found))
        (folder / "evaluate").mkdir(exist_ok=True)
        pq.write_table(pa.concat_tables(tables.values()), folder / "evaluate" / "attempts.parquet")
        document = scorecard(job, len(problems), cards, tables)
        write_json(folder / "evaluate" / "scorecard.json", document)
    return {label: {k: v["value"] for k, v in c["pass_at_k"].items()} for label, c in cards.items()}


def checkpoints_of(job: Job, folder: Path) -> dict[str, str]:
    """Label and folder of every model to evaluate, in the order in which they came to be."""
    found = {"base": job.model_path()}
    for name, home in job.homes(folder).items():
        for stage in TRAINING_STAGES:
            export = home / stage / "export"
            if export.exists():
                found[f"{name}/{stage}" if name else stage] = str(export)
    return found | job.evaluation.checkpoints


def written(path: str) -> list[int]:
    """When the weights of a local checkpoint were written, in ns."""
    return [file.stat().st_mtime_ns for file in sorted(Path(path).glob("*.safetensors"))]


def sample_all(
    job: Job,
    run: RunDir,
    checkpoints: dict[str, str],
    problems: Sequence[Problem],
    homes: dict[str, Path],
) -> None:
    """Fill the folder of every checkpoint that is not yet complete."""
    missing = {
        label: path
        for label, path in checkpoints.items()
        if not (homes[label] / LIKELIHOOD).exists()
    }
    if not missing:
        return
    connect()
    heldout = heldout_rows(job.scored_folder)
    first = next(iter(missing.values()))
    with (
        EnginePool.from_job(job, first, partial(run.event, "evaluate")) as pool,
        RewardPool(job.tasks, job.rewards) as reward_pool,
    ):
        for number, (label, path) in enumerate(missing.items()):
            if number:
                pool.load_folder(path)
            store = Store(homes[label])
            prompts = encode_problems(path, problems, job.generator.max_model_len)
            work = list(requests(job, prompts, problems, store.done()))
            log.info("evaluate: %s: %d requests for answers", label, len(work))
            attempt(label, work, problems, pool, reward_pool, store)
            found: dict[str, Any] = {"heldout_nll": heldout_nll(pool, heldout)}
            start = start_of(label, checkpoints)
            if start is not None and job.evaluation.temperature == 1.0:
                theirs = Store(homes[start]).table(problems)
                found["kl_from_start"] = kl_from(pool, prompts, theirs, job.run.seed)
            write_json(homes[label] / LIKELIHOOD, found)


def in_words(card: dict[str, Any]) -> str:
    """A scorecard on one line."""
    return ", ".join(f"pass@{k} {v['value']:.3f}" for k, v in card["pass_at_k"].items())
