"""Demonstrations of failed prompts, and completions with prefixes: micro-groups against a sequential reference, for any
order in which completions and grades arrive."""

from __future__ import annotations

import random
from dataclasses import replace
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.cooperate.schedulers import Demonstration, FailedPromptScheduler, PrefixScheduler, prefix_length
from pear_ray.data.tokenizer import encode_prompt, load_tokenizer
from pear_ray.losses.policy import group_advantages
from pear_ray.records import Completion, TrainingSequence
from pear_ray.rl.scheduler import RolloutScheduler, batch_metrics, soft_overlong_penalty
from pear_ray.statistics import seed_of
from tests.cooperate.scheduler_driver import (
    GROUP,
    MODEL_LEN,
    NEW_TOKENS,
    PROMPTS,
    STEPS,
    complete,
    grade,
    make_job,
    problem_stream,
    reward_of,
    run_scheduler,
    simulate_completion,
)

TRAPO = {
    "type": "trapo",
    "prefix_groups": [1, 1, 1, 1],
    "prefix_fracs": [0.0, 0.3, 0.5, 1.0],
    "prefix_returns": [-1.0, 0.5, 0.7, 0.9],
}


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
                row = found.response_ids, found.behavior_logprobs, 1.0, "teacher_plain", found.trainable
                expected.append(TrainingSequence.of(ids, *row))
        for sequence, other in zip(batch.demonstrations, expected, strict=True):
            for name, value in vars(other).items():
                assert np.array_equal(getattr(sequence, name), value), name


def with_trapo(model, method=None, **rl):
    return make_job(model, {"method": TRAPO | (method or {})}, **rl)


def sequential_group(job, tokenizer, index, ids, seed):
    """The completions of one problem and their rewards, one micro-group after another."""
    demonstration, method = index.find(ids), job.cooperate.method
    completions, rewards = [], []
    columns = (method.prefix_groups, method.prefix_fracs, method.prefix_returns)
    for size, frac, max_return in zip(*columns, strict=True):
        prefix, num_usable = (), 0
        if demonstration is not None and (np.mean(rewards) if rewards else 0.0) < max_return:
            trainable = demonstration.trainable or (True,) * len(demonstration.response_ids)
            num_usable = len(trainable) if all(trainable) else trainable.index(False)
            length = ceil(frac * num_usable)
            room = min(NEW_TOKENS, MODEL_LEN - len(ids))
            while length > room or (length == room and length < num_usable):
                length -= 1
            prefix = demonstration.response_ids[:length]
        for _ in range(size):
            limit = min(NEW_TOKENS, MODEL_LEN - len(ids)) - len(prefix)
            if prefix and len(prefix) == num_usable:
                sampled = Completion((), (), "", "stop", ())
            else:
                sampled = simulate_completion(ids + prefix, seed + len(completions), limit)
            text = tokenizer.decode(prefix + sampled.token_ids, skip_special_tokens=True).strip()
            completions.append((prefix, sampled, text if prefix else sampled.text))
        rewards += [reward_of(text) for _, _, text in completions[-size:]]
    return completions, rewards


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    staleness=st.integers(0, 2),
    sizes=st.sampled_from([[1, 1, 1, 1], [2, 1, 1], [1, 3], [4]]),
    fracs=st.lists(st.sampled_from([0.0, 0.0, 0.2, 0.5, 1.0]), min_size=4, max_size=4),
    returns=st.lists(st.sampled_from([-1.0, 0.3, 0.5, 0.7, 2.0]), min_size=4, max_size=4),
    buffer=st.sampled_from([0, 4]),
)
def test_prefixes_depend_on_earlier_rewards_as_in_the_sequential_reference(
    model, index, seed, staleness, sizes, fracs, returns, buffer
):
    method = {"prefix_groups": sizes, "prefix_fracs": fracs[: len(sizes)], "prefix_returns": returns[: len(sizes)]}
    job = with_trapo(model, method, max_staleness=staleness, overlong_buffer_tokens=buffer)
    tokenizer = load_tokenizer(model)
    scheduler = PrefixScheduler(index, job, model, 0, 0)
    batches, submitted = run_scheduler(scheduler, random.Random(seed))
    stream = problem_stream(job)
    for batch in batches:
        assert batch.demonstrations == ()
        for group in batch.groups:
            epoch, problem = next(stream)
            ids = tuple(encode_prompt(tokenizer, problem.messages))
            assert (group.problem_id, group.prompt_ids) == (problem.problem_id, ids)
            first = seed_of(job.run.seed, "rl", problem.problem_id, epoch)
            expected, rewards = sequential_group(job, tokenizer, index, ids, first)
            for (prefix, sampled, text), completion in zip(expected, group.completions, strict=True):
                logprobs = index.find(ids).behavior_logprobs[: len(prefix)] if prefix else ()
                assert completion == replace(sampled, text=text, prefix_ids=prefix, prefix_logprobs=logprobs)
                assert completion.num_tokens == len(prefix) + len(sampled.token_ids) <= NEW_TOKENS
                assert len(ids) + completion.num_tokens <= MODEL_LEN
            assert [grade.reward for grade in group.grades] == rewards
            if buffer:
                lengths = [completion.num_tokens for completion in group.completions]
                penalties = [soft_overlong_penalty(n, NEW_TOKENS, buffer) for n in lengths]
                rewards = [sum(pair) for pair in zip(rewards, penalties, strict=True)]
            advantages = group_advantages(torch.tensor(rewards), "grpo")
            assert group.advantages == pytest.approx(advantages.tolist())
        completions = [completion for group in batch.groups for completion in group.completions]
        frac = float(np.mean([bool(completion.prefix_ids) for completion in completions]))
        metrics = batch_metrics(batch)
        assert metrics.get("prefix_frac", 0.0) == frac
        assert ("prefix_frac" in metrics) == (frac > 0)
        mean_length = np.mean([completion.num_tokens for completion in completions])
        assert metrics["completions_mean_length"] == pytest.approx(mean_length)
        assert 0 <= metrics["staleness_mean"] <= metrics["staleness_max"] <= STEPS
    if staleness == 0:
        scheduler = PrefixScheduler(index, job, model, 0, 0)
        assert run_scheduler(scheduler, random.Random(seed + 1)) == (batches, submitted)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(0, 2), st.booleans())
def test_without_prefixes_requests_are_those_of_the_rollout_scheduler(model, index, seed, staleness, dynamic_sampling):
    method = {"prefix_fracs": [0.0] * 4, "prefix_returns": [2.0] * 4}
    rl = {"max_staleness": staleness, "dynamic_sampling": dynamic_sampling}
    job = with_trapo(model, method, **rl)
    batches, submitted = run_scheduler(PrefixScheduler(index, job, model, 0, 0), random.Random(seed))
    plain = run_scheduler(RolloutScheduler(job, model, 0, 0), random.Random(seed))
    assert (batches, submitted) == plain
    assert all("prefix_frac" not in batch_metrics(batch) for batch in batches)


def test_on_policy_the_next_micro_groups_of_all_problems_are_submitted_together(model, index):
    method = {"prefix_fracs": [0.0, 0.0, 0.3, 0.5], "prefix_returns": [2.0] * 4}
    scheduler = PrefixScheduler(index, with_trapo(model, method), model, 0, 0)
    sizes = []
    while (batch := scheduler.pop_batch()) is None:
        requests = scheduler.next_requests(0)
        sizes.append([request.num_samples for _, request in requests])
        for key, request in requests:
            assert scheduler.next_requests(0) == []
            pairs = scheduler.add_completions(key, complete(request))
            assert scheduler.next_requests(0) == []
            scheduler.add_rewards(key, grade(pairs))
    assert sizes == [[2] * PROMPTS, [1] * PROMPTS, [1] * PROMPTS]
    assert all(len(group.completions) == GROUP for group in batch.groups)


def test_off_policy_the_next_micro_group_of_a_problem_is_submitted_at_once(model, index):
    job = with_trapo(model, {"prefix_returns": [2.0] * 4}, max_staleness=1)
    scheduler = PrefixScheduler(index, job, model, 0, 0)
    (key, request), *others = scheduler.next_requests(0)
    assert len(others) == 2 * PROMPTS - 1
    scheduler.add_rewards(key, grade(scheduler.add_completions(key, complete(request))))
    ((next_key, next_request),) = scheduler.next_requests(0)
    assert next_key.position == key.position and next_request.seed == request.seed + 1
    assert next_request.min_version == request.min_version
    assert next_request.prompt_ids[: len(request.prompt_ids)] == request.prompt_ids
    num_prefix = len(next_request.prompt_ids) - len(request.prompt_ids)
    assert num_prefix and next_request.max_new_tokens == NEW_TOKENS - num_prefix


@pytest.mark.parametrize(("kl_coefficient", "expected"), [(0.0, None), (0.1, ())])
def test_a_whole_demonstration_is_graded_without_an_engine(model, index, kl_coefficient, expected):
    method = {"prefix_groups": [1, 3], "prefix_fracs": [0.0, 1.0], "prefix_returns": [-1.0, 2.0]}
    job = with_trapo(model, method, kl_coefficient=kl_coefficient)
    scheduler = PrefixScheduler(index, job, model, 0, 0)
    (key, request), *_ = scheduler.next_requests(0)
    assert scheduler.take_prefilled() == []
    scheduler.add_rewards(key, grade(scheduler.add_completions(key, complete(request))))
    ((prefilled_key, pairs),) = scheduler.take_prefilled()
    assert scheduler.take_prefilled() == []
    ids = index.find(request.prompt_ids).response_ids
    text = load_tokenizer(model).decode(ids, skip_special_tokens=True).strip()
    assert [answer for _, answer in pairs] == [text] * 3
    scheduler.add_rewards(prefilled_key, grade(pairs))
    for completion in scheduler._pending[key.position].group.completions[1:]:
        assert completion.prefix_ids == ids
        assert completion.token_ids == completion.logprobs == completion.version_spans == ()
        assert (completion.finish_reason, completion.reference_logprobs) == ("stop", expected)


def test_a_batch_of_whole_demonstrations_has_metrics(model, index):
    method = {"prefix_groups": [GROUP], "prefix_fracs": [1.0], "prefix_returns": [2.0]}
    scheduler = PrefixScheduler(index, with_trapo(model, method), model, 0, 0)
    assert scheduler.next_requests(0) == []
    for key, pairs in scheduler.take_prefilled():
        scheduler.add_rewards(key, grade(pairs))
    metrics = batch_metrics(scheduler.pop_batch())
    assert [metrics[name] for name in ("prefix_frac", "staleness_max", "staleness_mean")] == [1, 0, 0]


@settings(max_examples=40)
@given(st.integers(1, 40), st.floats(0, 1), st.integers(1, 40))
def test_a_prefix_leaves_room_for_a_token_unless_it_is_the_whole(num_tokens, frac, room):
    length = prefix_length(num_tokens, frac, room)
    assert 0 <= length <= min(num_tokens, room, ceil(frac * num_tokens))
    assert length < room or length == num_tokens
    if ceil(frac * num_tokens) < room:
        assert length == ceil(frac * num_tokens)


@pytest.mark.parametrize(
    ("trainable", "length"),
    [(None, 4), ((True,) * 4, 4), ((True, True, False, True), 2), ((False, True, True, True), 0)],
)
def test_the_first_answer_of_a_multi_turn_demonstration(trainable, length):
    demonstration = Demonstration((5, 6, 7, 8), (-1.0, -2.0, -3.0, -4.0), trainable, "teacher_plain")
    answer = demonstration.first_answer()
    assert answer.response_ids == demonstration.response_ids[:length]
    assert answer.behavior_logprobs == demonstration.behavior_logprobs[:length]
