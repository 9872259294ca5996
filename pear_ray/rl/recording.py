"""Rollouts on disk: a readable sample of each step, and all of them where the job asks for it, so
that learners can learn from them again without engines."""

from __future__ import annotations

import json
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.config import Job
from pear_ray.data.tokenizer import load_tokenizer
from pear_ray.errors import ConfigError
from pear_ray.records import Completion, Grade, RolloutGroup, TrainingSequence
from pear_ray.rl.scheduler import StepBatch
from pear_ray.run import atomic_write

FLOATS = pa.list_(pa.float32())
# An answer has a group, and a trace that is learned beside the answers has none: its `problem_id`
# is its origin, and its `token_ids`, `logprobs` and `trainable` begin with the prompt.
SCHEMA = pa.schema(
    [
        ("group", pa.int32()),
        ("problem_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", FLOATS),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("version_spans", pa.list_(pa.list_(pa.int64()))),
        ("reference_logprobs", FLOATS),
        ("reward", pa.float32()),
        ("correct", pa.bool_()),
        ("parts", pa.string()),
        ("note", pa.string()),
        ("advantage", pa.float32()),
        ("trace_ids", pa.list_(pa.int32())),
        ("trace_logprobs", FLOATS),
        ("trainable", pa.list_(pa.bool_())),
    ]
)
FACTS = ("step", "first_problem", "next_problem", "dropped")


class Recorder:
    """What is kept of each step's rollouts below `folder`."""

    def __init__(self, job: Job, folder: Path, path: str) -> None:
        self._folder, self._keeps_all = folder, job.rl.record
        self._tokenizer = load_tokenizer(path)

    def keep(self, batch: StepBatch) -> None:
        """Write a step's."""
        prompt = self._tokenizer.decode(batch.groups[0].prompt_ids)
        write_sample(self._folder / "samples", batch, prompt)
        if self._keeps_all:
            write(self._folder / "rollouts", batch)


def file_of(folder: Path, step: int) -> Path:
    """Where the rollouts of a step are recorded."""
    return folder / f"step-{step:06d}.parquet"


def write_sample(folder: Path, batch: StepBatch, prompt: str) -> None:
    """The answers to the first problem of a step as text, with what they earned."""
    group = batch.groups[0]
    lines = [f"step {batch.step}, problem {group.problem_id}", "", prompt, ""]
    for number, (answer, grade, advantage) in enumerate(
        zip(group.completions, group.grades, group.advantages, strict=True)
    ):
        lines += [
            f"--- answer {number}: reward {grade.reward:g}, advantage {advantage:+.2f},"
            f" {len(answer.token_ids)} tokens, {answer.finish_reason}"
            + (f", after {len(answer.trace_ids)} tokens of a trace" if answer.trace_ids else "")
            + (f", {grade.note}" if grade.note else ""),
            answer.text,
            "",
        ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step-{batch.step:06d}.txt").write_text("\n".join(lines))


def write(folder: Path, batch: StepBatch) -> None:
    """Record all rollouts of a step, one row for each answer and each trace beside them."""
    rows: list[dict[str, Any]] = [
        {
            "group": number,
            "problem_id": group.problem_id,
            "prompt_ids": group.prompt_ids,
            "token_ids": answer.token_ids,
            "logprobs": answer.logprobs,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "version_spans": answer.version_spans,
            "reference_logprobs": answer.reference_logprobs,
            "reward": grade.reward,
            "correct": grade.correct,
            "parts": json.dumps(grade.parts),
            "note": grade.note,
            "advantage": advantage,
            "trace_ids": answer.trace_ids,
            "trace_logprobs": answer.trace_logprobs,
        }
        for number, group in enumerate(batch.groups)
        for answer, grade, advantage in zip(
            group.completions, group.grades, group.advantages, strict=True
        )
    ]
    rows += [
        {
            "problem_id": trace.origin,
            "token_ids": trace.token_ids,
            "logprobs": trace.sampled_logprobs,
            "trainable": trace.trainable,
        }
        for trace in batch.traces
    ]
    facts = {key: getattr(batch, key) for key in FACTS}
    schema = SCHEMA.with_metadata({"batch": json.dumps(facts)})
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(file_of(folder, batch.step)) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema), partial)


def read(folder: Path, step: int) -> StepBatch:
    """The rollouts of a step, as they were recorded.

    Raises:
        ConfigError: they are not there, or cannot be read.
    """
    path = file_of(folder, step)
    try:
        table = pq.read_table(path, schema=None)
        facts = json.loads(table.schema.metadata[b"batch"])
        rows = table.to_pylist()
    except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ConfigError(
            f"rl.replay: {path} cannot be read as recorded rollouts of step {step}: {error}"
        ) from error
    answers = [row for row in rows if row["group"] is not None]
    groups = [list(members) for _, members in groupby(answers, key=itemgetter("group"))]
    return StepBatch(
        step=step,
        groups=tuple(group_of(members) for members in groups),
        traces=tuple(trace_of(row) for row in rows if row["group"] is None),
        first_problem=facts["first_problem"],
        next_problem=facts["next_problem"],
        dropped=tuple(facts["dropped"]),
    )


def group_of(rows: list[dict[str, Any]]) -> RolloutGroup:
    """The group of these answers."""
    return RolloutGroup(
        problem_id=rows[0]["problem_id"],
        prompt_ids=tuple(rows[0]["prompt_ids"]),
        completions=tuple(
            Completion(
                token_ids=tuple(row["token_ids"]),
                logprobs=tuple(row["logprobs"]),
                text=row["text"],
                finish_reason=row["finish_reason"],
                version_spans=tuple((version, count) for version, count in row["version_spans"]),
                reference_logprobs=(
                    None if row["reference_logprobs"] is None else tuple(row["reference_logprobs"])
                ),
                # Recordings were made before there were traces.
                trace_ids=tuple(row.get("trace_ids") or ()),
                trace_logprobs=tuple(row.get("trace_logprobs") or ()),
            )
            for row in rows
        ),
        grades=tuple(
            Grade(row["reward"], row["correct"], json.loads(row["parts"]), row["note"])
            for row in rows
        ),
        advantages=tuple(row["advantage"] for row in rows),
    )


def trace_of(row: dict[str, Any]) -> TrainingSequence:
    """The trace of this row."""
    return TrainingSequence.of(
        (), row["token_ids"], row["logprobs"], 1.0, row["problem_id"], row["trainable"]
    )
