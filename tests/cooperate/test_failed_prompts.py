"""Problems that are failed, and their traces."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.cooperate.failed_prompts import FailedPromptScheduler
from pear_ray.data.tokenizer import load_tokenizer, prompt_ids
from pear_ray.records import TrainingSequence
from pear_ray.rl.scheduler import RolloutScheduler
from pear_ray.seeds import seed_of
from tests.cooperate.by_hand import (
    GROUP,
    MODEL_LEN,
    NEW_TOKENS,
    job_of,
    reward_of,
    run,
    sampled,
    stream_of,
    traces_of,
)


@pytest.fixture(scope="module")
def model(tiny_model):
    return str(tiny_model(True))


@pytest.fixture(scope="module")
def traces(model, tmp_path_factory):
    return traces_of(model, tmp_path_factory.mktemp("scored"))


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.booleans(), st.integers(0, 1), st.sampled_from([0.0, 0.25, 0.5]))
def test_a_lesson_has_the_traces_of_the_problems_that_were_failed(
    model, traces, seed, replaces, staleness, most
):
    cooperate = {"method": "sum", "traces": "failed", "failed_pass_rate": most}
    job = job_of(model, cooperate, dynamic_sampling=replaces, max_staleness=staleness)
    lessons, asked = run(FailedPromptScheduler(traces, job, model, 0, 0), random.Random(seed))
    plain, same = run(RolloutScheduler(job, model, 0, 0), random.Random(seed))
    assert asked == same
    tokenizer = load_tokenizer(model)
    stream = stream_of(job)
    for batch, other in zip(lessons, plain, strict=True):
        assert (batch.groups, batch.dropped) == (other.groups, other.dropped)
        expected = []
        for _ in range(batch.first_problem, batch.next_problem):
            epoch, problem = next(stream)
            ids = tuple(prompt_ids(tokenizer, problem.messages))
            first = seed_of(job.run.seed, "rl", problem.problem_id, epoch)
            answers = [
                sampled(ids, first + n, min(NEW_TOKENS, MODEL_LEN - len(ids))) for n in range(GROUP)
            ]
            right = [reward_of(answer.text) == 1 for answer in answers]
            if sum(right) / GROUP <= most and (trace := traces.find(ids)) is not None:
                expected.append((ids, trace))
        for found, (ids, trace) in zip(batch.traces, expected, strict=True):
            wanted = TrainingSequence.of(
                ids, trace.response_ids, trace.behavior_logprobs, 1.0, "tutor", trace.trainable
            )
            for name, value in vars(wanted).items():
                assert np.array_equal(getattr(found, name), value), name
