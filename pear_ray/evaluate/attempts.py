"""Attempts of one checkpoint at all problems: sampled, graded and stored at the same time.

Stored attempts are not repeated. Seeds and prompts of the others do not depend on them, so an interrupted evaluation
ends with the same answers.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.config import Job
from pear_ray.engines.engine_pool import EnginePool
from pear_ray.engines.generator import SampleRequest
from pear_ray.records import ATTEMPT_SCHEMA, Attempt, Completion, Grade, Problem
from pear_ray.rewards.pool import RewardPool
from pear_ray.run import atomic_write
from pear_ray.seeds import seed_of

# Small enough for engines to share the work evenly.
SAMPLES_PER_REQUEST = 8
# At most this many seconds of sampling are lost in a crash.
SECONDS_BETWEEN_WRITES = 10.0
WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class AttemptRequest:
    """Some of a checkpoint's answers to one problem, numbered from `first_sample`."""

    problem: Problem
    first_sample: int
    sample: SampleRequest


class AttemptStore:
    """Attempts of one checkpoint in a folder of Parquet files, each written atomically."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[Attempt] = []
        self._written = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, attempts: Sequence[Attempt]) -> None:
        """Add attempts; they are written within the next `SECONDS_BETWEEN_WRITES` of adding."""
        self._rows += attempts
        if time.monotonic() > self._written + SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write the attempts added since the last write."""
        if self._rows:
            table = pa.Table.from_pylist([asdict(row) for row in self._rows], ATTEMPT_SCHEMA)
            with atomic_write(self._folder / f"{uuid.uuid4().hex}.parquet") as partial:
                pq.write_table(table, partial)
        self._rows = []
        self._written = time.monotonic()

    def stored(self) -> set[tuple[str, int]]:
        """Return problem id and sample of every stored attempt."""
        columns = ["problem_id", "sample"]
        tables = [pq.read_table(file, columns=columns) for file in self._files()]
        return {(row["problem_id"], row["sample"]) for t in tables for row in t.to_pylist()}

    def table(self, problems: Sequence[Problem]) -> pa.Table:
        """Return all attempts in the order of `problems` and samples."""
        order = {problem.problem_id: number for number, problem in enumerate(problems)}
        table = pa.concat_tables(pq.read_table(file) for file in self._files())
        numbers = [order[problem_id] for problem_id in table.column("problem_id").to_pylist()]
        rows = np.lexsort([table.column("sample").to_numpy(), numbers])
        return table.take(pa.array(rows)).cast(ATTEMPT_SCHEMA)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.parquet"))


def attempt_requests(
    job: Job, prompts: Sequence[tuple[int, ...]], problems: Sequence[Problem], stored: set[tuple[str, int]]
) -> Iterator[AttemptRequest]:
    """Yield requests for all attempts that are not `stored`. `prompts` are token ids."""
    settings = job.evaluation
    for problem, prompt in zip(problems, prompts, strict=True):
        for first in range(0, settings.samples_per_problem, SAMPLES_PER_REQUEST):
            if (problem.problem_id, first) in stored:
                continue
            num_samples = min(SAMPLES_PER_REQUEST, settings.samples_per_problem - first)
            seed = seed_of(job.run.seed, "evaluate", problem.problem_id, first)
            sample = SampleRequest(prompt, num_samples, seed, settings.temperature)
            yield AttemptRequest(problem, first, sample)


def sample_attempts(
    label: str, requests: Sequence[AttemptRequest], pool: EnginePool, reward_pool: RewardPool, store: AttemptStore
) -> None:
    """Sample and grade the attempts of checkpoint `label`, and add them to the store.

    Raises:
        TimeoutError: no engine answered for `generator.timeout_seconds`.
    """
    ungraded: dict[Hashable, tuple[AttemptRequest, Sequence[Completion]]] = {}

    def store_graded(timeout_seconds: float) -> None:
        for key, grades in reward_pool.pop_finished(timeout_seconds):
            store.add(attempts_of(label, *ungraded.pop(key), grades))

    for number, completions in pool.stream([request.sample for request in requests]):
        request = requests[number]
        ungraded[number] = request, completions
        reward_pool.submit(number, [(request.problem, answer.text) for answer in completions])
        store_graded(0.0)
    while ungraded:
        store_graded(WAIT_SECONDS)
    store.write()


def attempts_of(
    label: str, request: AttemptRequest, completions: Sequence[Completion], grades: Sequence[Grade]
) -> list[Attempt]:
    """Return one attempt per completion; only the first of a problem has its token ids."""
    return [
        Attempt(
            checkpoint=label,
            problem_id=request.problem.problem_id,
            task=request.problem.task,
            sample=sample,
            text=completion.text,
            correct=grade.correct,
            reward=grade.reward,
            num_tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
            mean_logprob=float(np.mean(completion.logprobs)),
            note=grade.note,
            parts=grade.parts,
            response_ids=None if sample else tuple(completion.token_ids),
            logprobs=None if sample else tuple(completion.logprobs),
        )
        for sample, (completion, grade) in enumerate(zip(completions, grades, strict=True), request.first_sample)
    ]
