"""Rollouts and demonstrations, written and read back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_ray.errors import ConfigError
from pear_ray.records import Completion, Grade, RolloutGroup, TrainingSequence
from pear_ray.rl.recording import batch_path, read_batch, write_batch, write_sample
from pear_ray.rl.scheduler import StepBatch

PLAIN = Completion((7, 1), (-0.5, -0.25), "w4", "stop", ((3, 1), (4, 1)))
CONTINUED = Completion((8,), (-2.0,), "w6 w7 w5", "length", ((4, 1),), (-1.0,), (9, 10), (-3.0, -4.0))
WHOLE = Completion((), (), "w6", "stop", (), (), (9, 1), (-3.0, -0.5))


def group_of(name, *completions):
    numbers = range(len(completions))
    grades = tuple(Grade(float(n), n > 0, {"part": 0.5, f"p{n}": 1.0}, "why") for n in numbers)
    return RolloutGroup(name, (4, 5), completions, grades, (0.5, -0.5, 0.25)[: len(completions)])


DEMONSTRATIONS = (
    TrainingSequence.of((4, 5), (7, 8, 1), (-0.5, 0.0, -1.5), 1.0, "teacher_plain", (True, False, True)),
    TrainingSequence.of((6,), (1,), (-0.125,), -0.5, "teacher_cipher"),
)
GROUPS = group_of("a", PLAIN, CONTINUED), group_of("b", WHOLE, PLAIN, CONTINUED)
BATCH = StepBatch(5, GROUPS, 17, 20, ("c",), DEMONSTRATIONS)


@pytest.mark.parametrize("demonstrations", [(), DEMONSTRATIONS])
def test_a_batch_is_read_as_it_was_written(tmp_path, demonstrations):
    batch = replace(BATCH, demonstrations=demonstrations)
    write_batch(tmp_path, batch)
    recorded = read_batch(tmp_path, 5)
    assert replace(recorded, demonstrations=()) == replace(batch, demonstrations=())
    for sequence, expected in zip(recorded.demonstrations, demonstrations, strict=True):
        for name, value in vars(expected).items():
            assert np.array_equal(getattr(sequence, name), value), name
            assert getattr(getattr(sequence, name), "dtype", None) == getattr(value, "dtype", None)


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="step 5"):
        read_batch(tmp_path, 5)
    pq.write_table(pa.table({"group": [1]}), batch_path(tmp_path, 5))
    with pytest.raises(ConfigError, match="step 5"):
        read_batch(tmp_path, 5)


def test_a_sample_marks_completions_that_continue_a_demonstration(tmp_path):
    write_sample(tmp_path, BATCH, "3 7 > 21")
    text = (tmp_path / "step-000005.txt").read_text()
    first, second = (line for line in text.splitlines() if line.startswith("--- "))
    assert first.endswith("2 tokens, stop, why")
    assert second.endswith("1 tokens, length, after 2 tokens of a demonstration, why")
