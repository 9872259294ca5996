"""Rollouts on disk: a readable sample of each step and, with `rl.record`, all of them, from which learners can train
again without engines (`rl.replay`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.config import Job
from pear_ray.data.tokenizer import load_tokenizer
from pear_ray.errors import ConfigError
from pear_ray.records import Completion, Grade, RolloutGroup, TrainingSequence, schema_of
from pear_ray.rl.rollouts import POLL_SECONDS, BatchSender, Link, RolloutBatch, RolloutStage
from pear_ray.rl.scheduler import StepBatch, batch_metrics
from pear_ray.run import atomic_write

# Batches that `replay` sends ahead of the learners.
STEPS_AHEAD = 64

DEMONSTRATION_ARRAYS = {
    "token_ids": np.int64,
    "trainable": np.bool_,
    "sampled_logprobs": np.float32,
    "coefficients": np.float32,
}
# A row is a group, or a demonstration that the step also trains on; the other column is null.
SCHEMA = pa.schema(
    {
        "group": pa.struct(
            {
                "problem_id": pa.string(),
                "prompt_ids": pa.list_(pa.int32()),
                "completions": pa.list_(pa.struct(schema_of(Completion))),
                "grades": pa.list_(pa.struct(schema_of(Grade))),
                "advantages": pa.list_(pa.float32()),
            }
        ),
        "demonstration": pa.struct(
            {name: pa.list_(pa.from_numpy_dtype(dtype)) for name, dtype in DEMONSTRATION_ARRAYS.items()}
            | {"origin": pa.string()}
        ),
    }
)
# In the metadata of the file.
BATCH_FIELDS = ("step", "first_problem", "next_problem", "dropped")


class Recorder:
    """Writes the rollouts of each step below `folder`."""

    def __init__(self, job: Job, folder: Path, path: str) -> None:
        self._folder = folder
        self._writes_all = job.rl.record
        self._tokenizer = load_tokenizer(path)

    def write(self, batch: StepBatch) -> None:
        """Write the sample of a step, and with `rl.record` all of its rollouts."""
        prompt = self._tokenizer.decode(batch.groups[0].prompt_ids)
        write_sample(self._folder / "samples", batch, prompt)
        if self._writes_all:
            write_batch(self._folder / "rollouts", batch)


def replay(stage: RolloutStage, link: Link) -> None:
    """Send recorded batches instead of new rollouts, a few steps ahead of the learners.

    Raises:
        ConfigError: a step was not recorded, or lacks reference log-probs.
    """
    rl = stage.job.rl
    assert rl.replay is not None
    folder = Path(rl.replay)
    with link.close_queue_on_error():
        first = link.wait_first_version(stage.job.learner.timeout_seconds)
        if first is None:
            return
        sender, step = BatchSender(link.queue), first.versions[-1].version
        for path in (batch_path(folder, number) for number in range(step, rl.steps)):
            if not path.exists():
                raise ConfigError(f"rl.replay: expected a recording of every step, got no {path}")
        while not link.finished.is_set():
            if step < rl.steps and step <= sender.newest_taken + STEPS_AHEAD:
                batch = read_batch(folder, step)
                completions = (c for group in batch.groups for c in group.completions)
                if rl.kl_coefficient and any(c.reference_logprobs is None for c in completions):
                    raise ConfigError(
                        f"rl.kl_coefficient: expected 0, since {batch_path(folder, step)} was"
                        f" recorded without reference log-probs, got {rl.kl_coefficient}"
                    )
                sender.send(RolloutBatch(batch, (), (), {}, batch_metrics(batch)))
                step += 1
                continue
            link.finished.wait(POLL_SECONDS)
            sender.poll()


def batch_path(folder: Path, step: int) -> Path:
    """Return the file of a step's rollouts."""
    return folder / f"step-{step:06d}.parquet"


def write_sample(folder: Path, batch: StepBatch, prompt: str) -> None:
    """Write the completions of a step's first group as text, with their grades."""
    group = batch.groups[0]
    lines = [f"step {batch.step}, problem {group.problem_id}", "", prompt, ""]
    for number, (completion, grade, advantage) in enumerate(
        zip(group.completions, group.grades, group.advantages, strict=True)
    ):
        num_prefix = len(completion.prefix_ids)
        lines += [
            f"--- completion {number}: reward {grade.reward:g}, advantage {advantage:+.2f},"
            f" {len(completion.token_ids)} tokens, {completion.finish_reason}"
            + (f", after {num_prefix} tokens of a demonstration" if num_prefix else "")
            + (f", {grade.note}" if grade.note else ""),
            completion.text,
            "",
        ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step-{batch.step:06d}.txt").write_text("\n".join(lines))


def write_batch(folder: Path, batch: StepBatch) -> None:
    """Write all rollouts of a step."""
    # `vars`, since `dataclasses.asdict` copies each token id by itself.
    groups = [
        vars(group)
        | {
            "completions": [vars(completion) for completion in group.completions],
            "grades": [vars(grade) for grade in group.grades],
        }
        for group in batch.groups
    ]
    rows = [{"group": group} for group in groups]
    rows += [{"demonstration": vars(sequence)} for sequence in batch.demonstrations]
    metadata = {name: getattr(batch, name) for name in BATCH_FIELDS}
    schema = SCHEMA.with_metadata({"batch": json.dumps(metadata)})
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(batch_path(folder, batch.step)) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema), partial)


def read_batch(folder: Path, step: int) -> StepBatch:
    """Return the rollouts of a step as `write_batch` got them.

    Raises:
        ConfigError: the file is missing or no recording.
    """
    path = batch_path(folder, step)
    try:
        table = pq.read_table(path)
        metadata = json.loads(table.schema.metadata[b"batch"])
        groups = table.column("group").to_pylist(maps_as_pydicts="strict")
        demonstrations = table.column("demonstration").to_pylist()
    except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ConfigError(f"rl.replay: expected recorded rollouts of step {step} in {path}, got {error!r}") from error
    return StepBatch(
        groups=tuple(parse_group(row) for row in groups if row),
        demonstrations=tuple(parse_demonstration(row) for row in demonstrations if row),
        **to_tuples(metadata),
    )


def parse_group(row: dict[str, Any]) -> RolloutGroup:
    """Return the group of a row."""
    row = to_tuples(row)
    row["completions"] = tuple(Completion(**completion) for completion in row["completions"])
    row["grades"] = tuple(Grade(**grade) for grade in row["grades"])
    return RolloutGroup(**row)


def parse_demonstration(row: dict[str, Any]) -> TrainingSequence:
    """Return the demonstration of a row."""
    arrays: dict[str, Any] = {name: np.array(row[name], dtype) for name, dtype in DEMONSTRATION_ARRAYS.items()}
    return TrainingSequence(origin=row["origin"], **arrays)


def to_tuples(value: Any) -> Any:
    """Return a JSON document with tuples for lists."""
    if isinstance(value, dict):
        return {key: to_tuples(item) for key, item in value.items()}
    return tuple(map(to_tuples, value)) if isinstance(value, list) else value
