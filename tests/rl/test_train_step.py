"""Training sequences of a step's completions, token by token; what a rank refuses to train on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_ray.config import Job
from pear_ray.engines.engine_actor import WeightUpdateResult
from pear_ray.losses.packing import pack
from pear_ray.records import Completion, Grade, RolloutGroup, TrainingSequence
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.rl.scheduler import StepBatch
from pear_ray.rl.train_step import ParityCheck, check_staleness, training_sequences

FIELDS = ("token_ids", "trainable", "sampled_logprobs", "coefficients", "reference_logprobs")


def job_of(**rl):
    return Job(
        run={"dir": "unused"},
        model={"path": "./model"},
        rl={"steps": 1, "prompts_per_step": 1, "group_size": 2, **rl},
        generator={"max_new_tokens": 8, "max_model_len": 32},
        tasks=[{"name": "countdown"}],
    )


def logprobs(count):
    return st.tuples(*[st.floats(-9, 0, width=32)] * count)


@st.composite
def completions(draw, max_prefix=3):
    num_prefix = draw(st.integers(0, max_prefix))
    num_sampled = draw(st.integers(0 if num_prefix else 1, 4))
    ids = st.integers(2, 90)
    return Completion(
        draw(st.tuples(*[ids] * num_sampled)),
        draw(logprobs(num_sampled)),
        "text",
        draw(st.sampled_from(["stop", "length"])) if num_sampled else "stop",
        ((0, num_sampled),) if num_sampled else (),
        draw(logprobs(num_sampled)),
        draw(st.tuples(*[ids] * num_prefix)),
        draw(logprobs(num_prefix)),
    )


def group_of(completions, advantages, prompt_ids=(4, 5)):
    grades = tuple(Grade(0.0, False) for _ in completions)
    return RolloutGroup("problem", prompt_ids, tuple(completions), grades, tuple(advantages))


def slow_arrays(completion, advantage, prompt_ids, is_masked):
    """Return the columns of one row per token: FIELDS, and whether it is of a demonstration."""
    rows = [(token, False, 0.0, 0.0, 0.0, False) for token in prompt_ids]
    for token, logprob in zip(completion.prefix_ids, completion.prefix_logprobs, strict=True):
        rows.append((token, True, logprob, 1.0, 0.0, True))
    sampled = zip(completion.token_ids, completion.logprobs, completion.reference_logprobs, strict=True)
    for token, logprob, reference in sampled:
        if is_masked and completion.finish_reason == "length":
            rows.append((token, False, 0.0, 0.0, 0.0, False))
        else:
            rows.append((token, True, logprob, advantage, reference, False))
    return [np.array(column) for column in zip(*rows, strict=True)]


@given(st.lists(st.tuples(completions(), st.floats(-2, 2, width=32)), min_size=1, max_size=5), st.booleans())
def test_prefixes_are_demonstrations_and_the_rest_has_the_advantage(pairs, is_masked):
    answers, advantages = zip(*pairs, strict=True)
    job, group = job_of(mask_truncated=is_masked), group_of(answers, advantages)
    expected = [slow_arrays(*pair, group.prompt_ids, is_masked) for pair in pairs]
    if not any(trainable.any() for _, trainable, *_ in expected):
        with pytest.raises(RuntimeError, match=r"^rl\.mask_truncated: "):
            training_sequences(job, (group,))
        return
    sequences = training_sequences(job, (group,))
    for sequence, completion, columns in zip(sequences, answers, expected, strict=True):
        *arrays, from_demonstration = columns
        for name, array in zip(FIELDS, arrays, strict=True):
            assert np.array_equal(getattr(sequence, name), array), name
        if completion.prefix_ids:
            assert np.array_equal(sequence.from_demonstration, from_demonstration)
        else:
            assert sequence.from_demonstration is None
        assert sequence.origin == "problem"


@given(completions(max_prefix=0), st.floats(-2, 2, width=32), st.booleans())
def test_without_a_prefix_it_is_training_sequence_of(completion, advantage, has_reference):
    if not has_reference:
        completion = Completion(*list(vars(completion).values())[:5])
    (sequence,) = training_sequences(job_of(), (group_of([completion], [advantage]),))
    expected = TrainingSequence.of(
        (4, 5),
        completion.token_ids,
        completion.logprobs,
        advantage,
        "problem",
        reference_logprobs=completion.reference_logprobs,
    )
    for name, value in vars(expected).items():
        assert np.array_equal(getattr(sequence, name), value), name
        assert getattr(getattr(sequence, name), "dtype", None) == getattr(value, "dtype", None)


def completion_of(num_tokens, finish_reason):
    ids, logprobs = tuple(range(num_tokens)), (-0.5,) * num_tokens
    return Completion(ids, logprobs, "", finish_reason, ((0, num_tokens),))


@pytest.mark.parametrize("capacity", [7, 100])
def test_masked_completions_are_packed_but_not_counted(capacity):
    reasons = {5: "length", 3: "stop", 6: "length", 4: "stop"}
    answers = [completion_of(*item) for item in reasons.items()]
    group = group_of(answers, [0.5] * 4, prompt_ids=(7, 8)[: capacity - 6])
    sequences = training_sequences(job_of(mask_truncated=True), (group,))
    assert [sequence.trainable.any() for sequence in sequences] == [False, True, False, True]
    batches = [batch for rank in pack(sequences, 2, capacity) for batch in rank]
    assert {(b.num_trainable_tokens_global, b.num_sequences_global) for b in batches} == {(7, 2)}
    assert sum(int(batch.trainable_T.sum()) for batch in batches) == 7
    assert sum(len(batch.origins) for batch in batches) == 4
    for batch in batches:
        masked = ~batch.trainable_T
        assert not batch.coefficients_T[masked].any() and not batch.sampled_logprobs_T[masked].any()


def test_arrays_are_0_at_tokens_that_are_not_trainable():
    sequence = TrainingSequence.of(
        [7, 8], [1, 2, 3], [-1, -2, -3], 2.0, "a", [True, False, True], None, None, [-4, -5, -6]
    )
    assert sequence.trainable.tolist() == [False, False, True, False, True]
    assert sequence.coefficients.tolist() == [0, 0, 2, 0, 2]
    assert sequence.sampled_logprobs.tolist() == [0, 0, -1, 0, -3]
    assert sequence.reference_logprobs.tolist() == [0, 0, -4, 0, -6]
    arrays = (sequence.coefficients, sequence.sampled_logprobs, sequence.reference_logprobs)
    assert all(array.dtype == np.float32 for array in arrays)


@pytest.mark.parametrize(("sampled", "reference"), [([-1.0], None), ([-1.0, -1.0], [-1.0]), ([-1.0], [-1.0, -1.0])])
def test_other_than_one_logprob_per_token_is_refused(sampled, reference):
    with pytest.raises(ValueError, match=r"^a-1: expected 2 log-probs, .*, got 1$"):
        TrainingSequence.of([7], [1, 2], sampled, 1.0, "a-1", reference_logprobs=reference)


@pytest.mark.parametrize("limit", [0, 2])
def test_a_batch_with_tokens_older_than_allowed_is_refused(limit):
    check_staleness(7, float(limit), limit)
    with pytest.raises(RuntimeError, match=rf"^step 7: .* rl\.max_staleness = {limit} .*, got {limit + 1}$"):
        check_staleness(7, limit + 1.0, limit)


class CertainLearner:
    """Gives every token the log-prob -1, whatever its weights."""

    def logprobs(self, batches):
        return [np.full(int(batch.trainable_T.sum()), -1.0, np.float32) for batch in batches]


def gap_of(engine_logprobs, limit=1e-4):
    """Check one sequence, scored by the engines under version 3, against `CertainLearner`."""
    job = job_of()
    job = job.model_copy(update={"weights": job.weights.model_copy(update={"max_logprob_gap": limit})})
    sequence = TrainingSequence.of((4, 5), (6, 7, 8), (0.0,) * 3, 1.0, "problem")
    update = WeightUpdateResult(3, 0.0, 0.0, 0.0, (np.array(engine_logprobs, np.float32),))
    batch = StepBatch(3, (), 0, 0, ())
    return ParityCheck(job, CertainLearner()).check(3, RolloutBatch(batch, (sequence,), (update,), {}, {}))


def test_parity_is_the_largest_gap_of_a_token():
    assert gap_of([-1.0, -1.25, -1.125], limit=0.25) == 0.25


@pytest.mark.parametrize("value", [-1.001, float("nan")])
def test_a_gap_between_engine_and_learner_stops_the_run(value):
    with pytest.raises(RuntimeError, match=r"^step 3: .* version 3 .* weights\.max_logprob_gap = 0\.0001, got "):
        gap_of([-1.0, value, -1.0])
