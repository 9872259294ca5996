"""What a step's answers are to the learner, token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_ray.config import Job
from pear_ray.records import Completion, Grade, RolloutGroup, TrainingSequence
from pear_ray.rl.build import sequences_of

FIELDS = ("token_ids", "trainable", "sampled_logprobs", "coefficients", "reference_logprobs")


def job_of(**rl):
    return Job(
        run={"dir": "unused"},
        model={"path": "./model"},
        rl={"steps": 1, "prompts_per_step": 1, "group_size": 2, **rl},
        generator={"max_new_tokens": 8, "max_model_len": 32},
        tasks=[{"name": "countdown"}],
    )


def numbers(count):
    return st.tuples(*[st.floats(-9, 0, width=32)] * count)


@st.composite
def completions(draw, longest_trace=3):
    num_shown = draw(st.integers(0, longest_trace))
    num_own = draw(st.integers(0 if num_shown else 1, 4))
    ids = st.integers(2, 90)
    return Completion(
        draw(st.tuples(*[ids] * num_own)),
        draw(numbers(num_own)),
        "text",
        draw(st.sampled_from(["stop", "length"])) if num_own else "stop",
        ((0, num_own),) if num_own else (),
        draw(numbers(num_own)),
        draw(st.tuples(*[ids] * num_shown)),
        draw(numbers(num_shown)),
    )


def group_of(answers, advantages, prompt_ids=(4, 5)):
    grades = tuple(Grade(0.0, False) for _ in answers)
    return RolloutGroup("problem", prompt_ids, tuple(answers), grades, tuple(advantages))


def slowly(answer, advantage, prompt_ids, masks):
    """One row per token: id, trainable, log-prob, coefficient, reference, whether a trace's."""
    rows = [(token, False, 0.0, 0.0, 0.0, False) for token in prompt_ids]
    for token, logprob in zip(answer.trace_ids, answer.trace_logprobs, strict=True):
        rows.append((token, True, logprob, 1.0, 0.0, True))
    own = zip(answer.token_ids, answer.logprobs, answer.reference_logprobs, strict=True)
    for token, logprob, reference in own:
        if masks and answer.finish_reason == "length":
            rows.append((token, False, 0.0, 0.0, 0.0, False))
        else:
            rows.append((token, True, logprob, advantage, reference, False))
    return [np.array(column) for column in zip(*rows, strict=True)]


@given(
    st.lists(st.tuples(completions(), st.floats(-2, 2, width=32)), min_size=1, max_size=5),
    st.sampled_from(["keep", "mask"]),
)
def test_tokens_of_a_trace_are_a_traces_and_the_rest_the_policys(pairs, overlong):
    answers, advantages = zip(*pairs, strict=True)
    job, group = job_of(overlong=overlong), group_of(answers, advantages)
    expected = [slowly(*pair, group.prompt_ids, overlong == "mask") for pair in pairs]
    if not any(trainable.any() for _, trainable, *_ in expected):
        with pytest.raises(RuntimeError, match="were cut"):
            sequences_of(job, (group,))
        return
    for found, answer, wanted in zip(sequences_of(job, (group,)), answers, expected, strict=True):
        *arrays, from_trace = wanted
        for name, array in zip(FIELDS, arrays, strict=True):
            assert np.array_equal(getattr(found, name), array), name
        if answer.trace_ids:
            assert np.array_equal(found.from_trace, from_trace)
        else:
            assert found.from_trace is None
        assert found.origin == "problem"


@given(completions(longest_trace=0), st.floats(-2, 2, width=32), st.booleans())
def test_an_answer_without_a_trace_is_what_it_was(answer, advantage, has_reference):
    """As `TrainingSequence.of` makes it, types included."""
    if not has_reference:
        answer = Completion(*list(vars(answer).values())[:5])
    (found,) = sequences_of(job_of(), (group_of([answer], [advantage]),))
    wanted = TrainingSequence.of(
        (4, 5),
        answer.token_ids,
        answer.logprobs,
        advantage,
        "problem",
        reference_logprobs=answer.reference_logprobs,
    )
    for name, value in vars(wanted).items():
        assert np.array_equal(getattr(found, name), value), name
        assert getattr(getattr(found, name), "dtype", None) == getattr(value, "dtype", None)
