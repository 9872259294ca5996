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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.actors.cluster import connect
from pear_ray.actors.engines import fleet_of
from pear_ray.actors.fleet import Fleet
from pear_ray.actors.parts import name_of
from pear_ray.actors.verifiers import Verifiers
from pear_ray.config import Job
from pear_ray.engines.generator import Trace
from pear_ray.manifest import Run, write_json
from pear_ray.records import Problem
from pear_ray.stages.evaluate.attempts import Store, attempt, requests
from pear_ray.stages.evaluate.scorecard import card, scorecard
from pear_ray.tasks import heldout_problems

log = logging.getLogger(__name__)

# Held-out loss of a checkpoint, written when all else of it is there.
NLL = "heldout_nll.json"


def run(job: Job, run: Run) -> dict[str, Any]:
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
    with run.growing_folder("evaluate", sampled_how) as folder:
        # Weights that were trained again since are another checkpoint.
        homes = {
            label: folder / "attempts" / name_of(f"{label} {path} {written(path)}")
            for label, path in checkpoints.items()
        }
        sample_all(job, run, checkpoints, problems, homes)
        tables = {label: Store(home).table(problems) for label, home in homes.items()}
        cards = {
            label: card(job, path, tables[label], json.loads((homes[label] / NLL).read_text()))
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
        for stage in ("sft", "rl"):
            export = home / stage / "export"
            if export.exists():
                found[f"{name}/{stage}" if name else stage] = str(export)
    return found | job.evaluation.checkpoints


def written(path: str) -> list[int]:
    """When the weights of a local checkpoint were written, in ns."""
    return [file.stat().st_mtime_ns for file in sorted(Path(path).glob("*.safetensors"))]


def sample_all(
    job: Job,
    run: Run,
    checkpoints: dict[str, str],
    problems: Sequence[Problem],
    homes: dict[str, Path],
) -> None:
    """Fill the folder of every checkpoint that is not yet complete."""
    missing = {
        label: path for label, path in checkpoints.items() if not (homes[label] / NLL).exists()
    }
    if not missing:
        return
    connect()
    heldout = heldout_rows(job.scored_folder)
    first = next(iter(missing.values()))
    with (
        fleet_of(job, first, partial(run.event, "evaluate")) as fleet,
        Verifiers(job.tasks, job.verifier) as verifiers,
    ):
        for number, (label, path) in enumerate(missing.items()):
            if number:
                fleet.load_folder(path)
            store = Store(homes[label])
            work = list(requests(job, path, problems, store.done()))
            log.info("evaluate: %s: %d requests for answers", label, len(work))
            attempt(label, work, problems, fleet, verifiers, store)
            write_json(homes[label] / NLL, heldout_nll(fleet, heldout))


def in_words(card: dict[str, Any]) -> str:
    """A scorecard on one line."""
    return ", ".join(f"pass@{k} {v['value']:.3f}" for k, v in card["pass_at_k"].items())


def heldout_rows(folder: Path) -> list[dict[str, Any]]:
    """Prompt and response ids of the held-out rows of the scored corpus, if there is one, and
    which of the latter are the assistant's."""
    rows = []
    for file in sorted(folder.glob("*.parquet")):
        wanted = {"prompt_ids", "response_ids", "trainable"} & set(pq.read_schema(file).names)
        heldout = [("split", "==", "heldout")]
        rows += pq.read_table(file, columns=sorted(wanted), filters=heldout).to_pylist()
    return rows


def heldout_nll(fleet: Fleet, rows: list[dict[str, Any]]) -> float | None:
    """Mean loss over the assistant's tokens of the held-out rows, in nats."""
    if not rows:
        return None
    scores = fleet.ask([Trace(tuple(r["prompt_ids"]), tuple(r["response_ids"])) for r in rows])
    chosen = [score[row.get("trainable") or ...] for score, row in zip(scores, rows, strict=True)]
    return float(-np.concatenate(chosen).mean())
