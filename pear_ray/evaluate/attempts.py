"""Answers of one checkpoint to all problems, sampled, judged and stored while others are sampled.

An attempt is done when it is stored; whoever takes up the work again asks for the others alone.
What is asked does not depend on what was stored before, so neither do the answers.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict
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

# Answers asked for together: few enough for engines to share the work evenly.
SAMPLES_PER_REQUEST = 8
# What a crash may cost, in seconds of sampling.
SECONDS_BETWEEN_WRITES = 10.0
# Longest wait for the next verdict; verifiers see to it that each comes.
LOOK_SECONDS = 10.0

Key = tuple[int, int]
"""Number of the problem, first of the samples."""


class Store:
    """The attempts of one checkpoint, in files each of which is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[Attempt] = []
        self._written = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, attempts: Sequence[Attempt]) -> None:
        """Keep them, written at the latest with those of the next few seconds."""
        self._rows += attempts
        if time.monotonic() > self._written + SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write what is not yet written."""
        if self._rows:
            table = pa.Table.from_pylist([asdict(row) for row in self._rows], ATTEMPT_SCHEMA)
            with atomic_write(self._folder / f"{uuid.uuid4().hex}.parquet") as partial:
                pq.write_table(table, partial)
        self._rows, self._written = [], time.monotonic()

    def done(self) -> set[tuple[str, int]]:
        """Problem and sample of every stored attempt."""
        columns = ["problem_id", "sample"]
        tables = [pq.read_table(file, columns=columns) for file in self._files()]
        return {(row["problem_id"], row["sample"]) for t in tables for row in t.to_pylist()}

    def table(self, problems: Sequence[Problem]) -> pa.Table:
        """All of them, problem by problem."""
        place = {problem.problem_id: number for number, problem in enumerate(problems)}
        found = pa.concat_tables(pq.read_table(file) for file in self._files())
        numbers = [place[name] for name in found.column("problem_id").to_pylist()]
        order = np.lexsort([found.column("sample").to_numpy(), numbers])
        return found.take(pa.array(order)).cast(ATTEMPT_SCHEMA)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.parquet"))


def requests(
    job: Job,
    prompts: Sequence[tuple[int, ...]],
    problems: Sequence[Problem],
    done: set[tuple[str, int]],
) -> Iterator[tuple[Key, SampleRequest]]:
    """What is to be asked of a checkpoint whose stored attempts are `done`. `prompts` are the
    problems' token ids."""
    settings = job.evaluation
    for number, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
        for first in range(0, settings.samples_per_problem, SAMPLES_PER_REQUEST):
            if (problem.problem_id, first) in done:
                continue
            num_samples = min(SAMPLES_PER_REQUEST, settings.samples_per_problem - first)
            seed = seed_of(job.run.seed, "evaluate", problem.problem_id, first)
            yield (number, first), SampleRequest(prompt, num_samples, seed, settings.temperature)


def attempt(
    label: str,
    work: Sequence[tuple[Key, SampleRequest]],
    problems: Sequence[Problem],
    pool: EnginePool,
    reward_pool: RewardPool,
    store: Store,
) -> None:
    """Have all of it answered, judged and stored as attempts of the checkpoint `label`.

    Raises:
        TimeoutError: as `Fleet.stream`.
    """
    answers: dict[Hashable, tuple[Completion, ...]] = {}

    def keep(timeout_seconds: float) -> None:
        for place, grades in reward_pool.pop_finished(timeout_seconds):
            number, first = keys[place]
            store.add(rows_of(label, problems[number], first, answers.pop(place), grades))

    keys: dict[Hashable, Key] = {place: key for place, (key, _) in enumerate(work)}
    for place, answered in pool.stream([request for _, request in work]):
        answers[place], (number, _) = answered, keys[place]
        reward_pool.submit(place, [(problems[number], answer.text) for answer in answered])
        keep(0.0)
    while answers:
        keep(LOOK_SECONDS)
    store.write()


def rows_of(
    label: str,
    problem: Problem,
    first: int,
    answers: Sequence[Completion],
    grades: Sequence[Grade],
) -> list[Attempt]:
    """One row for each answer, numbered from `first`."""
    return [
        Attempt(
            checkpoint=label,
            problem_id=problem.problem_id,
            task=problem.task,
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
        for sample, (answer, grade) in enumerate(zip(answers, grades, strict=True), first)
    ]
