"""Stage `evaluate`: pass@k of every checkpoint on held-out problems, with intervals over problems.

    for each checkpoint: load weights -> sample, grade, store attempts -> held-out loss, KL

All checkpoints answer the same problems with the same seeds, so that they are compared pair by pair. Interrupted, the
same command samples only the missing attempts.
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
from pear_ray.data.tokenizer import encode_problems, fingerprint
from pear_ray.engines.engine_pool import EnginePool
from pear_ray.evaluate.attempts import AttemptStore, attempt_requests, sample_attempts
from pear_ray.evaluate.scorecard import checkpoint_card, heldout_nll, heldout_rows, kl_from_start, scorecard
from pear_ray.ray_cluster import connect
from pear_ray.records import Problem
from pear_ray.rewards.pool import RewardPool
from pear_ray.run import RunDir, write_json
from pear_ray.tasks import heldout_problems

log = logging.getLogger(__name__)

# Held-out loss and KL of a checkpoint; written last, it marks its folder as complete.
LIKELIHOOD = "likelihood.json"


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Evaluate the model the run starts from and every export of it and of its arms."""
    checkpoints = find_checkpoints(job, run.folder)
    problems = heldout_problems(job.tasks, job.evaluation.num_problems, job.run.seed)
    made_from = {
        "samples_per_problem": job.evaluation.samples_per_problem,
        "temperature": job.evaluation.temperature,
        "max_new_tokens": job.generator.max_new_tokens,
        "seed": job.run.seed,
        "problems": [problem.problem_id for problem in problems],
    }
    with run.resumable_folder("evaluate", made_from) as folder:
        # Weights that were trained again since are another checkpoint.
        homes = {
            label: folder / "attempts" / fingerprint(f"{label} {path} {modification_times(path)}")
            for label, path in checkpoints.items()
        }
        sample_missing(job, run, checkpoints, problems, homes)
        tables = {label: AttemptStore(home).table(problems) for label, home in homes.items()}
        cards = {}
        for label, path in checkpoints.items():
            likelihood = json.loads((homes[label] / LIKELIHOOD).read_text())
            card = checkpoint_card(job, path, tables[label]) | likelihood
            scores = [f"pass@{k} {score['value']:.3f}" for k, score in card["pass_at_k"].items()]
            log.info("evaluate: %s: %s", label, ", ".join(scores))
            cards[label] = card
        (folder / "evaluate").mkdir(exist_ok=True)
        pq.write_table(pa.concat_tables(tables.values()), folder / "evaluate" / "attempts.parquet")
        document = scorecard(job, len(problems), cards, tables)
        write_json(folder / "evaluate" / "scorecard.json", document)
    return {label: {k: v["value"] for k, v in c["pass_at_k"].items()} for label, c in cards.items()}


def find_checkpoints(job: Job, folder: Path) -> dict[str, str]:
    """Return label and folder of every model to evaluate, in the order of training."""
    paths = {"base": job.model_path()}
    for name, home in job.homes(folder).items():
        for stage in TRAINING_STAGES:
            export = home / stage / "export"
            if export.exists():
                paths[f"{name}/{stage}" if name else stage] = str(export)
    return paths | job.evaluation.checkpoints


def modification_times(path: str) -> list[int]:
    """Return when the weights of a local checkpoint were written, in ns."""
    return [file.stat().st_mtime_ns for file in sorted(Path(path).glob("*.safetensors"))]


def sample_missing(
    job: Job, run: RunDir, checkpoints: dict[str, str], problems: Sequence[Problem], homes: dict[str, Path]
) -> None:
    """Complete the folder of every checkpoint, on engines that load one after another."""
    missing = [label for label in checkpoints if not (homes[label] / LIKELIHOOD).exists()]
    if not missing:
        return
    connect()
    heldout = heldout_rows(job.scored_folder)
    with (
        EnginePool.from_job(job, checkpoints[missing[0]], partial(run.event, "evaluate")) as pool,
        RewardPool(job.tasks, job.rewards) as reward_pool,
    ):
        for label in missing:
            path = checkpoints[label]
            if label != missing[0]:
                pool.load_folder(path)
            store = AttemptStore(homes[label])
            prompts = encode_problems(path, problems, job.generator.max_model_len)
            requests = list(attempt_requests(job, prompts, problems, store.stored()))
            log.info("evaluate: %s: %d requests", label, len(requests))
            sample_attempts(label, requests, pool, reward_pool, store)
            likelihood: dict[str, Any] = {"heldout_nll": heldout_nll(pool, heldout)}
            start = start_of(label, checkpoints)
            if start is not None and job.evaluation.temperature == 1.0:
                attempts = AttemptStore(homes[start]).table(problems)
                kl = kl_from_start(pool, prompts, attempts, job.run.seed)
                likelihood["kl_from_start"] = kl
            write_json(homes[label] / LIKELIHOOD, likelihood)
