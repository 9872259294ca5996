"""Over-long answers: the punishment piece by piece, and truncated answers as a step sees them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.losses.packing import pack
from pear_ray.records import Completion, TrainingSequence
from pear_ray.rl.overlong import soft_punishment, trainable_unless_truncated


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0), (16384, 0), (16385, -1 / 4096), (18432, -0.5), (20480, -1), (20481, -1), (10**9, -1)],
)
def test_the_papers_lengths(num_tokens, expected):
    assert soft_punishment(num_tokens, max_tokens=20480, cache_tokens=4096) == expected


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.integers(1, 200), st.integers(1, 200))
def test_the_three_cases_of_the_equation(num_tokens, max_tokens, cache_tokens):
    if cache_tokens > max_tokens:
        return
    if num_tokens <= max_tokens - cache_tokens:
        expected = 0.0
    elif num_tokens <= max_tokens:
        expected = ((max_tokens - cache_tokens) - num_tokens) / cache_tokens
    else:
        expected = -1.0
    assert soft_punishment(num_tokens, max_tokens, cache_tokens) == expected


@pytest.mark.parametrize(("cache_tokens", "max_tokens"), [(0, 10), (-3, 10), (11, 10), (1, 0)])
def test_a_cache_that_does_not_fit_is_refused(cache_tokens, max_tokens):
    said = f"cache_tokens: read {cache_tokens}; expected 1 to max_tokens = {max_tokens}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        soft_punishment(5, max_tokens, cache_tokens)


def answer(num_tokens, finish_reason):
    return Completion(
        token_ids=tuple(range(num_tokens)),
        logprobs=(-0.5,) * num_tokens,
        text="",
        finish_reason=finish_reason,
        version_spans=((0, num_tokens),),
    )


@pytest.mark.parametrize(("finish_reason", "learned"), [("stop", True), ("length", False)])
def test_only_what_ended_by_itself_is_learned(finish_reason, learned):
    trainable = trainable_unless_truncated(answer(3, finish_reason))
    assert trainable.dtype == bool and trainable.tolist() == [learned] * 3


def sequence(completion):
    return TrainingSequence.of(
        [7, 8],
        completion.token_ids,
        completion.logprobs,
        0.5,
        completion.finish_reason,
        response_trainable=trainable_unless_truncated(completion),
    )


@pytest.mark.parametrize("capacity", [7, 100])
def test_truncated_answers_are_read_and_not_counted(capacity):
    answers = [answer(5, "length"), answer(3, "stop"), answer(5, "length"), answer(4, "stop")]
    batches = [b for rank in pack([sequence(a) for a in answers], 2, capacity) for b in rank]
    counts = {(b.num_trainable_tokens_global, b.num_sequences_global) for b in batches}
    assert counts == {(7, 2)}
    assert sum(int(b.trainable_T.sum()) for b in batches) == 7
    assert sum(origin == "length" for b in batches for origin in b.origins) == 2
    for batch in batches:
        hidden = ~batch.trainable_T
        assert not batch.coefficients_T[hidden].any() and not batch.sampled_logprobs_T[hidden].any()


def test_arrays_hold_nothing_where_nothing_is_learned():
    made = TrainingSequence.of(
        [7, 8], [1, 2, 3], [-1, -2, -3], 2.0, "a", [True, False, True], None, None, [-4, -5, -6]
    )
    assert made.trainable.tolist() == [False, False, True, False, True]
    assert made.coefficients.tolist() == [0, 0, 2, 0, 2]
    assert made.sampled_logprobs.tolist() == [0, 0, -1, 0, -3]
    assert made.reference_logprobs.tolist() == [0, 0, -4, 0, -6]
    arrays = (made.coefficients, made.sampled_logprobs, made.reference_logprobs)
    assert all(array.dtype == np.float32 for array in arrays)


@pytest.mark.parametrize(
    ("sampled", "reference"), [([-1.0], None), ([-1.0, -1.0], [-1.0]), ([-1.0], [-1.0, -1.0])]
)
def test_as_many_logprobs_as_tokens(sampled, reference):
    with pytest.raises(ValueError, match=r"^a-1: 1 log-probs for 2 response tokens$"):
        TrainingSequence.of([7], [1, 2], sampled, 1.0, "a-1", reference_logprobs=reference)
