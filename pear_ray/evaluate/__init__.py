"""Stage `evaluate`: pass@k of every checkpoint on held-out problems, with intervals over problems.

    for each checkpoint: load weights -> sample, grade, store attempts -> held-out loss, KL

All checkpoints answer the same problems with the same seeds, so that they are compared pair by pair. Interrupted, the
same command samples only the missing attempts: seeds and prompts do not depend on those that are stored.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.config import TRAINING_STAGES, Job, start_of
from pear_ray.data.tokenizer import encode_problems, fingerprint
from pear_ray.engines.engine_pool import EnginePool
from pear_ray.engines.generator import SampleRequest
from pear_ray.evaluate.scorecard import checkpoint_card, heldout_nll, heldout_rows, kl_from_start, scorecard
from pear_ray.records import ATTEMPT_SCHEMA, Attempt, Completion, Grade, Problem
from pear_ray.rewards.pool import RewardPool
from pear_ray.run import RunDir, atomic_write, connect, write_json
from pear_ray.statistics import seed_of
from pear_ray.tasks import heldout_problems

log = logging.getLogger(__name__)

# Held-out loss and KL of a checkpoint; written last, it marks its folder as complete.
LIKELIHOOD = "likelihood.json"
# Small enough for engines to share the work evenly.
SAMPLES_PER_REQUEST = 8
# At most this many seconds of sampling are lost in a crash.
SECONDS_BETWEEN_WRITES = 10.0
WAIT_SECONDS = 10.0


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
        homes = {}
        for label, path in checkpoints.items():
            # Weights that were trained again since are another checkpoint.
            written = [file.stat().st_mtime_ns for file in sorted(Path(path).glob("*.safetensors"))]
            homes[label] = folder / "attempts" / fingerprint(f"{label} {path} {written}")
        sample_missing(job, run, checkpoints, problems, homes)
        tables, cards = {}, {}
        for label, path in checkpoints.items():
            tables[label] = AttemptStore(homes[label]).table(problems)
            likelihood = json.loads((homes[label] / LIKELIHOOD).read_text())
            cards[label] = checkpoint_card(job, path, tables[label]) | likelihood
            scores = [f"pass@{k} {score['value']:.3f}" for k, score in cards[label]["pass_at_k"].items()]
            log.info("evaluate: %s: %s", label, ", ".join(scores))
        (folder / "evaluate").mkdir(exist_ok=True)
        pq.write_table(pa.concat_tables(tables.values()), folder / "evaluate" / "attempts.parquet")
        write_json(folder / "evaluate" / "scorecard.json", scorecard(job, len(problems), cards, tables))
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
        EnginePool(job, checkpoints[missing[0]], partial(run.event, "evaluate")) as pool,
        RewardPool(job.tasks, job.rewards) as reward_pool,
    ):
        for label in missing:
            if label != missing[0]:
                pool.load_folder(checkpoints[label])
            store = AttemptStore(homes[label])
            prompts = encode_problems(checkpoints[label], problems, job.generator.max_model_len)
            requests = list(attempt_requests(job, prompts, problems, store.stored()))
            log.info("evaluate: %s: %d requests", label, len(requests))
            sample_attempts(label, requests, pool, reward_pool, store)
            likelihood: dict[str, Any] = {"heldout_nll": heldout_nll(pool, heldout)}
            start = start_of(label, checkpoints)
            if start is not None and job.evaluation.temperature == 1.0:
                attempts = AttemptStore(homes[start]).table(problems)
                likelihood["kl_from_start"] = kl_from_start(pool, prompts, attempts, job.run.seed)
            write_json(homes[label] / LIKELIHOOD, likelihood)


@dataclass(frozen=True)
class AttemptRequest:
    """Some of a checkpoint's answers to one problem, numbered from `first_sample`."""

    problem: Problem
    first_sample: int
    sample: SampleRequest


def attempt_requests(
    job: Job, prompts: Sequence[tuple[int, ...]], problems: Sequence[Problem], stored: set[tuple[str, int]]
) -> Iterator[AttemptRequest]:
    """Yield requests for all attempts that are not `stored`. `prompts` are token ids."""
    settings = job.evaluation
    for problem, prompt in zip(problems, prompts, strict=True):
        for first in range(0, settings.samples_per_problem, SAMPLES_PER_REQUEST):
            if (problem.problem_id, first) not in stored:
                num_samples = min(SAMPLES_PER_REQUEST, settings.samples_per_problem - first)
                seed = seed_of(job.run.seed, "evaluate", problem.problem_id, first)
                yield AttemptRequest(problem, first, SampleRequest(prompt, num_samples, seed, settings.temperature))


def sample_attempts(
    label: str, requests: Sequence[AttemptRequest], pool: EnginePool, reward_pool: RewardPool, store: AttemptStore
) -> None:
    """Sample and grade the attempts of checkpoint `label`, and add them to the store. Raise TimeoutError if no engine
    answers for `generator.timeout_seconds`."""
    ungraded: dict[Hashable, tuple[AttemptRequest, Sequence[Completion]]] = {}

    def store_graded(timeout_seconds: float) -> None:
        for key, grades in reward_pool.pop_finished(timeout_seconds):
            store.add(label, *ungraded.pop(key), grades)

    for number, completions in pool.stream([request.sample for request in requests]):
        request = requests[number]
        ungraded[number] = request, completions
        reward_pool.submit(number, [(request.problem, answer.text) for answer in completions])
        store_graded(0.0)
    while ungraded:
        store_graded(WAIT_SECONDS)
    store.write()


class AttemptStore:
    """Attempts of one checkpoint in a folder of Parquet files, each written atomically."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[Attempt] = []
        self._written = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, label: str, request: AttemptRequest, answers: Sequence[Completion], grades: Sequence[Grade]) -> None:
        """Add graded answers of checkpoint `label`; only the first to a problem keeps its token ids. They are written
        within the next `SECONDS_BETWEEN_WRITES` of adding."""
        self._rows += [
            Attempt(
                checkpoint=label,
                problem_id=request.problem.problem_id,
                task=request.problem.task,
                sample=sample,
                text=answer.text,
                correct=grade.correct,
                reward=grade.reward,
                num_tokens=len(answer.token_ids),
                finish_reason=answer.finish_reason,
                mean_logprob=float(np.mean(answer.logprobs)),
                note=grade.note,
                parts=grade.parts,
                response_ids=None if sample else tuple(answer.token_ids),
                logprobs=None if sample else tuple(answer.logprobs),
            )
            for sample, (answer, grade) in enumerate(zip(answers, grades, strict=True), request.first_sample)
        ]
        if time.monotonic() > self._written + SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write the attempts added since the last write."""
        if self._rows:
            table = pa.Table.from_pylist([asdict(row) for row in self._rows], ATTEMPT_SCHEMA)
            with atomic_write(self._folder / f"{uuid.uuid4().hex}.parquet") as file:
                pq.write_table(table, file)
        self._rows = []
        self._written = time.monotonic()

    def stored(self) -> set[tuple[str, int]]:
        """Return problem id and sample of every stored attempt."""
        tables = [pq.read_table(file, columns=["problem_id", "sample"]) for file in self._folder.glob("*.parquet")]
        return {(row["problem_id"], row["sample"]) for table in tables for row in table.to_pylist()}

    def table(self, problems: Sequence[Problem]) -> pa.Table:
        """Return all attempts in the order of `problems` and samples."""
        order = {problem.problem_id: number for number, problem in enumerate(problems)}
        table = pa.concat_tables(pq.read_table(file) for file in sorted(self._folder.glob("*.parquet")))
        numbers = [order[problem_id] for problem_id in table.column("problem_id").to_pylist()]
        rows = np.lexsort([table.column("sample").to_numpy(), numbers])
        return table.take(pa.array(rows)).cast(ATTEMPT_SCHEMA)
