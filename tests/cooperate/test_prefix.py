"""Answers that traces begin: the micro-groups of each problem against a plain walk through them, in
whatever order answers and verdicts come."""

from __future__ import annotations

import random
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.cooperate.demonstrations import Demonstration
from pear_ray.cooperate.prefix import PrefixScheduler, beginning, first_answer_of
from pear_ray.data.tokenizer import load_tokenizer, prompt_ids
from pear_ray.losses.advantages import group_advantages
from pear_ray.records import Completion
from pear_ray.rl.overlong import soft_punishment
from pear_ray.rl.scheduler import RolloutScheduler, batch_metrics
from pear_ray.seeds import seed_of
from tests.cooperate.by_hand import (
    GROUP,
    MODEL_LEN,
    NEW_TOKENS,
    PROBLEMS,
    STEPS,
    answers_to,
    job_of,
    reward_of,
    run,
    sampled,
    stream_of,
    traces_of,
    verdicts_on,
)

TRAPO = {
    "method": "trapo",
    "prefix_groups": [1, 1, 1, 1],
    "prefix_fracs": [0.0, 0.3, 0.5, 1.0],
    "prefix_returns": [-1.0, 0.5, 0.7, 0.9],
}


@pytest.fixture(scope="module")
def model(tiny_model):
    return str(tiny_model(True))


@pytest.fixture(scope="module")
def traces(model, tmp_path_factory):
    return traces_of(model, tmp_path_factory.mktemp("scored"))


def slow_group(job, tokenizer, traces, ids, seed):
    """The answers to one problem and their rewards, one micro-group after another."""
    trace = traces.find(ids)
    found, rewards = [], []
    said = job.cooperate
    columns = (said.prefix_groups, said.prefix_fracs, said.prefix_returns)
    for size, share, below in zip(*columns, strict=True):
        shown = ()
        if trace is not None and (sum(rewards) / len(rewards) if rewards else 0.0) < below:
            known = trace.trainable or (True,) * len(trace.response_ids)
            usable = len(known) if all(known) else known.index(False)
            length = ceil(share * usable)
            room = min(NEW_TOKENS, MODEL_LEN - len(ids))
            while length > room or (length == room and length < usable):
                length -= 1
            shown = trace.response_ids[:length]
        is_whole = bool(shown) and len(shown) == usable
        for _ in range(size):
            limit = min(NEW_TOKENS - len(shown), MODEL_LEN - len(ids) - len(shown))
            own = (
                Completion((), (), "", "stop", ())
                if is_whole
                else sampled(ids + shown, seed + len(found), limit)
            )
            text = tokenizer.decode(shown + own.token_ids, skip_special_tokens=True).strip()
            found.append((shown, own, text if shown else own.text))
        rewards += [reward_of(text) for _, _, text in found[-size:]]
    return found, rewards


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    staleness=st.integers(0, 2),
    sizes=st.sampled_from([[1, 1, 1, 1], [2, 1, 1], [1, 3], [4]]),
    shares=st.lists(st.sampled_from([0.0, 0.0, 0.2, 0.5, 1.0]), min_size=4, max_size=4),
    below=st.lists(st.sampled_from([-1.0, 0.3, 0.5, 0.7, 2.0]), min_size=4, max_size=4),
    cache=st.sampled_from([0, 4]),
)
def test_each_answer_has_the_beginning_that_those_before_it_call_for(
    model, traces, seed, staleness, sizes, shares, below, cache
):
    cooperate = {
        "method": "trapo",
        "prefix_groups": sizes,
        "prefix_fracs": shares[: len(sizes)],
        "prefix_returns": below[: len(sizes)],
    }
    job = job_of(model, cooperate, max_staleness=staleness, overlong_buffer_tokens=cache)
    tokenizer = load_tokenizer(model)
    lessons, asked = run(PrefixScheduler(traces, job, model, 0, 0), random.Random(seed))
    stream = stream_of(job)
    for batch in lessons:
        assert batch.traces == ()
        for group in batch.groups:
            epoch, problem = next(stream)
            assert group.problem_id == problem.problem_id
            ids = tuple(prompt_ids(tokenizer, problem.messages))
            first = seed_of(job.run.seed, "rl", problem.problem_id, epoch)
            expected, rewards = slow_group(job, tokenizer, traces, ids, first)
            trace = traces.find(ids)
            assert group.prompt_ids == ids
            for (shown, own, text), answer in zip(expected, group.completions, strict=True):
                assert (answer.trace_ids, answer.token_ids) == (shown, own.token_ids)
                assert (answer.logprobs, answer.text) == (own.logprobs, text)
                assert (answer.finish_reason, answer.version_spans) == (
                    own.finish_reason,
                    own.version_spans,
                )
                assert answer.trace_logprobs == (
                    trace.behavior_logprobs[: len(shown)] if shown else ()
                )
                assert answer.num_tokens <= NEW_TOKENS
                assert len(ids) + answer.num_tokens <= MODEL_LEN
            assert [grade.reward for grade in group.grades] == rewards
            if cache:
                lengths = [answer.num_tokens for answer in group.completions]
                punished = [soft_punishment(length, NEW_TOKENS, cache) for length in lengths]
                rewards = [sum(pair) for pair in zip(rewards, punished, strict=True)]
            advantages = group_advantages(torch.tensor(rewards), "grpo")
            assert group.advantages == pytest.approx(advantages.tolist())
        answers = [answer for group in batch.groups for answer in group.completions]
        share = float(np.mean([bool(answer.trace_ids) for answer in answers]))
        numbers = batch_metrics(batch)
        assert numbers.get("prefix_frac", 0.0) == share
        assert ("prefix_frac" in numbers) == (share > 0)
        tokens = [len(answer.trace_ids) + len(answer.token_ids) for answer in answers]
        assert numbers["completions_mean_length"] == pytest.approx(np.mean(tokens))
        assert 0 <= numbers["staleness_mean"] <= numbers["staleness_max"] <= STEPS
    if staleness == 0:
        scheduler = PrefixScheduler(traces, job, model, 0, 0)
        assert run(scheduler, random.Random(seed + 1)) == (lessons, asked)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(0, 2), st.booleans())
def test_without_beginnings_requests_are_those_of_a_plain_course(
    model, traces, seed, staleness, replaces
):
    cooperate = TRAPO | {"prefix_fracs": [0.0] * 4, "prefix_returns": [2.0] * 4}
    job = job_of(model, cooperate, max_staleness=staleness, dynamic_sampling=replaces)
    lessons, asked = run(PrefixScheduler(traces, job, model, 0, 0), random.Random(seed))
    assert (lessons, asked) == run(RolloutScheduler(job, model, 0, 0), random.Random(seed))
    assert all("prefix_frac" not in batch_metrics(batch) for batch in lessons)


def test_micro_groups_go_in_rounds(model, traces):
    """On-policy all problems' next ones are asked together, and not before."""
    cooperate = TRAPO | {"prefix_fracs": [0.0, 0.0, 0.3, 0.5], "prefix_returns": [2.0] * 4}
    scheduler = PrefixScheduler(traces, job_of(model, cooperate), model, 0, 0)
    sizes = []
    while (batch := scheduler.pop_batch()) is None:
        work = scheduler.next_requests(0)
        sizes.append([request.num_samples for _, request in work])
        for key, request in work:
            assert scheduler.next_requests(0) == []
            pairs = scheduler.add_completions(key, answers_to(request))
            assert scheduler.next_requests(0) == []
            scheduler.add_rewards(key, verdicts_on(pairs))
    assert sizes == [[2] * PROBLEMS, [1] * PROBLEMS, [1] * PROBLEMS]
    assert all(len(group.completions) == GROUP for group in batch.groups)


def test_overlapped_a_problem_goes_on_at_once(model, traces):
    cooperate = TRAPO | {"prefix_returns": [2.0] * 4}
    scheduler = PrefixScheduler(traces, job_of(model, cooperate, max_staleness=1), model, 0, 0)
    (key, request), *others = scheduler.next_requests(0)
    assert len(others) == 2 * PROBLEMS - 1
    scheduler.add_rewards(key, verdicts_on(scheduler.add_completions(key, answers_to(request))))
    ((after, follower),) = scheduler.next_requests(0)
    assert after.position == key.position and follower.seed == request.seed + 1
    assert follower.min_version == request.min_version
    assert follower.prompt_ids[: len(request.prompt_ids)] == request.prompt_ids
    num_shown = len(follower.prompt_ids) - len(request.prompt_ids)
    assert num_shown and follower.max_new_tokens == NEW_TOKENS - num_shown


@pytest.mark.parametrize(("kl_coefficient", "expected"), [(0.0, None), (0.1, ())])
def test_a_whole_trace_is_judged_without_an_engine(model, traces, kl_coefficient, expected):
    cooperate = TRAPO | {
        "prefix_groups": [1, 3],
        "prefix_fracs": [0.0, 1.0],
        "prefix_returns": [-1.0, 2.0],
    }
    job = job_of(model, cooperate, kl_coefficient=kl_coefficient)
    scheduler = PrefixScheduler(traces, job, model, 0, 0)
    (key, request), *_ = scheduler.next_requests(0)
    assert scheduler.take_prefilled() == []
    scheduler.add_rewards(key, verdicts_on(scheduler.add_completions(key, answers_to(request))))
    ((given_key, pairs),) = scheduler.take_prefilled()
    assert scheduler.take_prefilled() == []
    trace = traces.find(request.prompt_ids)
    text = load_tokenizer(model).decode(trace.response_ids, skip_special_tokens=True).strip()
    assert [answer for _, answer in pairs] == [text] * 3
    scheduler.add_rewards(given_key, verdicts_on(pairs))
    group = scheduler._asked[key.position].group
    assert {answer.trace_ids for answer in group.completions[1:]} == {trace.response_ids}
    for answer in group.completions[1:]:
        assert answer.token_ids == answer.logprobs == answer.version_spans == ()
        assert (answer.finish_reason, answer.reference_logprobs) == ("stop", expected)


def test_a_step_of_whole_traces_has_numbers(model, traces):
    cooperate = TRAPO | {
        "prefix_groups": [GROUP],
        "prefix_fracs": [1.0],
        "prefix_returns": [2.0],
    }
    scheduler = PrefixScheduler(traces, job_of(model, cooperate), model, 0, 0)
    assert scheduler.next_requests(0) == []
    for key, pairs in scheduler.take_prefilled():
        scheduler.add_rewards(key, verdicts_on(pairs))
    numbers = batch_metrics(scheduler.pop_batch())
    assert (numbers["prefix_frac"], numbers["staleness_max"], numbers["staleness_mean"]) == (
        1,
        0,
        0,
    )


@settings(max_examples=40)
@given(st.integers(1, 40), st.floats(0, 1), st.integers(1, 40))
def test_a_beginning_leaves_room(num_tokens, share, room):
    found = beginning(num_tokens, share, room)
    assert 0 <= found <= min(num_tokens, room, ceil(share * num_tokens))
    assert found < room or found == num_tokens
    if ceil(share * num_tokens) < room:
        assert found == ceil(share * num_tokens)


@pytest.mark.parametrize(
    ("trainable", "num_left"),
    [(None, 4), ((True,) * 4, 4), ((True, True, False, True), 2), ((False, True, True, True), 0)],
)
def test_only_the_first_answer_of_a_conversation_is_shown(trainable, num_left):
    trace = Demonstration((5, 6, 7, 8), (-1.0, -2.0, -3.0, -4.0), trainable, "tutor")
    found = first_answer_of(trace)
    assert found.response_ids == trace.response_ids[:num_left]
    assert found.behavior_logprobs == trace.behavior_logprobs[:num_left]
