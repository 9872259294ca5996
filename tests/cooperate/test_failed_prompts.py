"""Failed prompts and their demonstrations."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.cooperate.schedulers import FailedPromptScheduler
from pear_ray.data.tokenizer import encode_prompt, load_tokenizer
from pear_ray.records import TrainingSequence
from pear_ray.rl.scheduler import RolloutScheduler
from pear_ray.statistics import seed_of
from tests.cooperate.scheduler_driver import (
    GROUP,
    MODEL_LEN,
    NEW_TOKENS,
    make_job,
    problem_stream,
    reward_of,
    run_scheduler,
    simulate_completion,
)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.booleans(), st.integers(0, 1), st.sampled_from([0.0, 0.25, 0.5]))
def test_a_batch_has_the_demonstrations_of_failed_prompts(
    model, index, seed, dynamic_sampling, staleness, failed_pass_rate
):
    cooperate = {"traces": "failed", "failed_pass_rate": failed_pass_rate}
    job = make_job(model, cooperate, dynamic_sampling=dynamic_sampling, max_staleness=staleness)
    scheduler = FailedPromptScheduler(index, job, model, 0, 0)
    batches, submitted = run_scheduler(scheduler, random.Random(seed))
    plain, same = run_scheduler(RolloutScheduler(job, model, 0, 0), random.Random(seed))
    assert submitted == same
    tokenizer = load_tokenizer(model)
    stream = problem_stream(job)
    for batch, other in zip(batches, plain, strict=True):
        assert (batch.groups, batch.dropped) == (other.groups, other.dropped)
        expected = []
        for _ in range(batch.first_problem, batch.next_problem):
            epoch, problem = next(stream)
            ids = tuple(encode_prompt(tokenizer, problem.messages))
            first = seed_of(job.run.seed, "rl", problem.problem_id, epoch)
            limit = min(NEW_TOKENS, MODEL_LEN - len(ids))
            texts = [simulate_completion(ids, first + n, limit).text for n in range(GROUP)]
            num_correct = sum(reward_of(text) == 1 for text in texts)
            found = index.find(ids)
            if num_correct / GROUP <= failed_pass_rate and found is not None:
                row = found.response_ids, found.behavior_logprobs, 1.0, "tutor", found.trainable
                expected.append(TrainingSequence.of(ids, *row))
        for sequence, other in zip(batch.demonstrations, expected, strict=True):
            for name, value in vars(other).items():
                assert np.array_equal(getattr(sequence, name), value), name
