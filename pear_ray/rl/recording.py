"""Rollouts on disk: a readable sample of each step and, with `rl.record`, all of them, from which learners can train
again without engines (`rl.replay`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.errors import ConfigError
from pear_ray.records import Completion, Grade, RolloutGroup, TrainingSequence, schema_of
from pear_ray.rl.rollouts import POLL_SECONDS, BatchSender, Link, RolloutBatch, RolloutStage
from pear_ray.rl.scheduler import StepBatch, batch_metrics
from pear_ray.run import atomic_write

# Batches that `replay` sends ahead of the learners.
STEPS_AHEAD = 64

ARRAYS = {"token_ids": np.int64, "trainable": np.bool_, "sampled_logprobs": np.float32, "coefficients": np.float32}
DEMONSTRATION = {name: pa.list_(pa.from_numpy_dtype(dtype)) for name, dtype in ARRAYS.items()}
GROUP = {
    "problem_id": pa.string(),
    "prompt_ids": pa.list_(pa.int32()),
    "completions": pa.list_(pa.struct(schema_of(Completion))),
    "grades": pa.list_(pa.struct(schema_of(Grade))),
    "advantages": pa.list_(pa.float32()),
}
# A row is a group, or a demonstration that the step also trains on; the other column is null.
SCHEMA = pa.schema({"group": pa.struct(GROUP), "demonstration": pa.struct(DEMONSTRATION | {"origin": pa.string()})})


def replay(stage: RolloutStage, link: Link) -> None:
    """Send recorded batches instead of new rollouts, a few steps ahead of the learners. Raise ConfigError if a step was
    not recorded, or lacks reference log-probs."""
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
            if step >= rl.steps or step > sender.newest_taken + STEPS_AHEAD:
                link.finished.wait(POLL_SECONDS)
                sender.poll()
                continue
            batch = read_batch(folder, step)
            completions = (c for group in batch.groups for c in group.completions)
            if rl.kl_coefficient and any(c.reference_logprobs is None for c in completions):
                raise ConfigError(
                    f"rl.kl_coefficient: expected 0, since {batch_path(folder, step)} was recorded without reference"
                    f" log-probs, got {rl.kl_coefficient}"
                )
            sender.send(RolloutBatch(batch, (), (), {}, batch_metrics(batch)))
            step += 1


def batch_path(folder: Path, step: int) -> Path:
    """Return the file of a step's rollouts."""
    return folder / f"step-{step:06d}.parquet"


def write_sample(folder: Path, batch: StepBatch, prompt: str) -> None:
    """Write the completions of a step's first group as text, with their grades."""
    group = batch.groups[0]
    lines = [f"step {batch.step}, problem {group.problem_id}", "", prompt, ""]
    samples = zip(group.completions, group.grades, group.advantages, strict=True)
    for number, (completion, grade, advantage) in enumerate(samples):
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
    rows: list[dict[str, Any]] = []
    # `vars`, since `dataclasses.asdict` copies each token id by itself.
    for group in batch.groups:
        lists = {"completions": list(map(vars, group.completions)), "grades": list(map(vars, group.grades))}
        rows.append({"group": vars(group) | lists})
    rows += [{"demonstration": vars(sequence)} for sequence in batch.demonstrations]
    metadata = {name: getattr(batch, name) for name in ("step", "first_problem", "next_problem", "dropped")}
    schema = SCHEMA.with_metadata({"batch": json.dumps(metadata)})
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(batch_path(folder, batch.step)) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema), partial)


def read_batch(folder: Path, step: int) -> StepBatch:
    """Return the rollouts of a step as `write_batch` got them. Raise ConfigError if the file is missing or no
    recording."""
    path = batch_path(folder, step)
    try:
        table = pq.read_table(path)
        metadata = _tuples(json.loads(table.schema.metadata[b"batch"]))
        group_rows = _tuples(table.column("group").to_pylist(maps_as_pydicts="strict"))
        demonstration_rows = table.column("demonstration").to_pylist()
    except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ConfigError(f"rl.replay: expected recorded rollouts of step {step} in {path}, got {error!r}") from error
    groups = []
    for row in filter(None, group_rows):
        completions = tuple(Completion(**completion) for completion in row.pop("completions"))
        grades = tuple(Grade(**grade) for grade in row.pop("grades"))
        groups.append(RolloutGroup(completions=completions, grades=grades, **row))
    demonstrations = []
    for row in filter(None, demonstration_rows):
        arrays: dict[str, Any] = {name: np.array(row[name], dtype) for name, dtype in ARRAYS.items()}
        demonstrations.append(TrainingSequence(origin=row["origin"], **arrays))
    return StepBatch(groups=tuple(groups), demonstrations=tuple(demonstrations), **metadata)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
