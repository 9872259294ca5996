"""Rollouts and the traces beside them, written and read again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from pear_ray.errors import ConfigError
from pear_ray.records import Completion, Grade, RolloutGroup, TrainingSequence
from pear_ray.rl.recording import file_of, read, write, write_sample
from pear_ray.rl.scheduler import StepBatch

PLAIN = Completion((7, 1), (-0.5, -0.25), "w4", "stop", ((3, 1), (4, 1)))
BEGUN = Completion((8,), (-2.0,), "w6 w7 w5", "length", ((4, 1),), (-1.0,), (9, 10), (-3.0, -4.0))
WHOLE = Completion((), (), "w6", "stop", (), (), (9, 1), (-3.0, -0.5))


def group_of(name, *answers):
    grades = tuple(Grade(float(n), n > 0, {"part": 0.5}, "why") for n in range(len(answers)))
    return RolloutGroup(name, (4, 5), answers, grades, (0.5, -0.5, 0.25)[: len(answers)])


TRACES = (
    TrainingSequence.of((4, 5), (7, 8, 1), (-0.5, 0.0, -1.5), 1.0, "tutor", (True, False, True)),
    TrainingSequence.of((6,), (1,), (-0.125,), 1.0, "coder"),
)
LESSON = StepBatch(
    5, (group_of("a", PLAIN, BEGUN), group_of("b", WHOLE, PLAIN, BEGUN)), 17, 20, ("c",), TRACES
)


@pytest.mark.parametrize("traces", [(), TRACES])
def test_a_lesson_is_read_as_it_was_written(tmp_path, traces):
    batch = replace(LESSON, traces=traces)
    write(tmp_path, batch)
    found = read(tmp_path, 5)
    assert replace(found, traces=()) == replace(batch, traces=())
    for sequence, expected in zip(found.traces, traces, strict=True):
        for name, value in vars(expected).items():
            assert np.array_equal(getattr(sequence, name), value), name
            assert getattr(getattr(sequence, name), "dtype", None) == getattr(value, "dtype", None)


def test_a_recording_from_before_there_were_traces_is_read(tmp_path):
    batch = replace(LESSON, groups=(group_of("a", PLAIN, PLAIN),), traces=())
    write(tmp_path, batch)
    path = file_of(tmp_path, 5)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["trace_ids", "trace_logprobs", "trainable"]), path)
    assert read(tmp_path, 5) == batch


def test_what_is_no_recording_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="step 5"):
        read(tmp_path, 5)


def test_a_sample_says_which_answers_a_trace_began(tmp_path):
    write_sample(tmp_path, LESSON, "3 7 > 21")
    text = (tmp_path / "step-000005.txt").read_text()
    first, second = (line for line in text.splitlines() if line.startswith("--- "))
    assert first.endswith("2 tokens, stop, why")
    assert second.endswith("1 tokens, length, after 2 tokens of a trace, why")
