"""Each problem goes to exactly one step, in the order of the stream, sampled with weights that are new enough, in
whatever order completions and grades come."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.config import Job
from pear_ray.records import Completion, Grade
from pear_ray.rl.scheduler import MAX_DROPPED_PER_PROMPT, RolloutScheduler, batch_metrics, soft_overlong_penalty
from pear_ray.statistics import seed_of
from pear_ray.tasks import endless_problems

PROBLEMS, GROUP = 3, 2


@pytest.fixture(scope="module")
def model(tiny_model):
    return str(tiny_model(True))


def job_of(model: str, **rl: object) -> Job:
    return Job(
        run={"dir": "unused", "seed": 5},
        model={"path": model, "dtype": "float32"},
        rl={"steps": 6, "prompts_per_step": PROBLEMS, "group_size": GROUP, **rl},
        generator={"max_new_tokens": 8, "max_model_len": 32},
        learner={"tokens_per_micro_batch": 64},
        tasks=[{"name": "countdown", "options": {"max_number": 4}}],
    )


def completions_at(version: int) -> tuple[Completion, ...]:
    return tuple(
        Completion((5, 6, 1), (-1.0, -2.0, -0.5), f"answer {n}", "stop", ((version, 3),)) for n in range(GROUP)
    )


def grades_of(has_signal: bool) -> list[Grade]:
    return [Grade(float(n == 0 and has_signal), n == 0 and has_signal) for n in range(GROUP)]


def problem_ids(job: Job, count: int) -> list[str]:
    stream = endless_problems(job.tasks, "train", seed_of(job.run.seed, "rl"))
    return [problem.problem_id for _, problem in islice(stream, count)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3), st.booleans(), st.integers(0, 2**32), st.floats(0.4, 1), st.integers(0, 4)
)  # fmt: skip
def test_each_problem_goes_to_one_step(model, staleness, replaces, seed, signal, first_step):
    """A random run: learners lag by a random number of steps."""
    draw = random.Random(seed)
    job = job_of(model, max_staleness=staleness, dynamic_sampling=replaces)
    first_problem = 3 * first_step
    scheduler = RolloutScheduler(job, model, first_step, first_problem)
    version, batches, sampled, has_signal = first_step, [], {}, {}
    waiting: list[tuple[int, int]] = []
    ungraded: list[int] = []
    while len(batches) < job.rl.steps - first_step:
        engine_version = draw.randint(first_step, version)
        for position, request in scheduler.next_requests(version):
            assert position not in sampled
            assert request.min_version <= version
            # Engines hold requests for a newer version.
            sampled[position] = max(request.min_version, engine_version)
            waiting.append((position, sampled[position]))
        draw.shuffle(waiting)
        for _ in range(draw.randint(0, len(waiting))):
            position, sampled_by = waiting.pop()
            pairs = scheduler.add_completions(position, completions_at(sampled_by))
            assert len(pairs) == GROUP
            ungraded.append(position)
        draw.shuffle(ungraded)
        for _ in range(draw.randint(0, len(ungraded))):
            position = ungraded.pop()
            has_signal[position] = draw.random() < signal
            scheduler.add_rewards(position, grades_of(has_signal[position]))
        while (batch := scheduler.pop_batch()) is not None:
            batches.append(batch)
        # Learners take the batches one by one.
        if version < first_step + len(batches):
            version += draw.randint(0, 1)
    ends = [first_problem, *(batch.next_problem for batch in batches)]
    stream = problem_ids(job, ends[-1])
    for number, batch in enumerate(batches):
        assert batch.step == first_step + number
        assert (batch.first_problem, batch.next_problem) == tuple(ends[number : number + 2])
        positions = range(batch.first_problem, batch.next_problem)
        kept = [n for n in positions if has_signal[n] or not replaces]
        assert [group.problem_id for group in batch.groups] == [stream[n] for n in kept]
        assert list(batch.dropped) == [stream[n] for n in positions if n not in kept]
        assert len(kept) == PROBLEMS
        assert all(batch.step - sampled[n] <= staleness for n in kept)
        assert batch_metrics(batch)["staleness_max"] <= staleness


def test_prompts_after_the_last_step_are_not_sampled(model):
    job = job_of(model, steps=2, max_staleness=5)
    scheduler = RolloutScheduler(job, model, 0, 0)
    assert len(scheduler.next_requests(0)) == 2 * PROBLEMS
    assert scheduler.next_requests(0) == scheduler.next_requests(1) == []


def test_on_policy_dropped_groups_are_replaced_once_all_are_graded(model):
    scheduler = RolloutScheduler(job_of(model, dynamic_sampling=True), model, 0, 0)
    requests = scheduler.next_requests(0)
    for position, _ in requests:
        scheduler.add_completions(position, completions_at(0))
    for position, _ in requests[:-1]:
        scheduler.add_rewards(position, grades_of(has_signal=False))
        assert scheduler.next_requests(0) == []
    scheduler.add_rewards(requests[-1][0], grades_of(has_signal=True))
    assert [position for position, _ in scheduler.next_requests(0)] == [PROBLEMS, PROBLEMS + 1]


def test_a_group_in_which_one_completion_has_the_mean_reward_has_signal(model):
    scheduler = RolloutScheduler(job_of(model, dynamic_sampling=True, group_size=3), model, 0, 0)
    for position, _ in scheduler.next_requests(0):
        scheduler.add_completions(position, (*completions_at(0), *completions_at(0))[:3])
        scheduler.add_rewards(position, [Grade(reward, reward == 1.0) for reward in (0.0, 0.5, 1.0)])
    batch = scheduler.pop_batch()
    assert batch is not None and not batch.dropped
    assert 0.0 in batch.groups[0].advantages and any(batch.groups[0].advantages)


def test_off_policy_a_dropped_group_is_replaced_at_once(model):
    job = job_of(model, dynamic_sampling=True, max_staleness=1)
    scheduler = RolloutScheduler(job, model, 0, 0)
    (first, _), *others = scheduler.next_requests(0)
    assert len(others) == 2 * PROBLEMS - 1
    scheduler.add_completions(first, completions_at(0))
    scheduler.add_rewards(first, grades_of(has_signal=False))
    assert [position for position, _ in scheduler.next_requests(0)] == [2 * PROBLEMS]


def test_problems_that_never_have_a_signal_fail_the_run(model):
    scheduler = RolloutScheduler(job_of(model, dynamic_sampling=True), model, 0, 0)
    with pytest.raises(RuntimeError, match=r"^step 0: dropped 61 problems, ") as raised:
        for _ in range(MAX_DROPPED_PER_PROMPT + 2):
            for position, _ in scheduler.next_requests(0):
                scheduler.add_completions(position, completions_at(0))
                scheduler.add_rewards(position, grades_of(has_signal=False))
            assert scheduler.pop_batch() is None
    assert "rl.dynamic_sampling" in str(raised.value)


def test_long_completions_earn_less(model):
    """The last 6 of at most 8 tokens are penalized: 3 tokens lose a sixth."""
    job = job_of(model, overlong_buffer_tokens=6, advantage="dr_grpo")
    scheduler = RolloutScheduler(job, model, 0, 0)
    for position, _ in scheduler.next_requests(0):
        short, long = completions_at(0)
        short = Completion((5, 1), (-1.0, -2.0), "short", "stop", ((0, 2),))
        scheduler.add_completions(position, (short, long))
        scheduler.add_rewards(position, [Grade(1.0, True), Grade(1.0, True)])
    batch = scheduler.pop_batch()
    assert batch is not None
    for group in batch.groups:
        assert group.advantages == pytest.approx((1 / 12, -1 / 12))
        assert [grade.reward for grade in group.grades] == [1.0, 1.0]


def test_seeds_of_a_problem_differ_between_epochs(model):
    job = job_of(model, steps=10**6, max_staleness=400)
    requests = dict(RolloutScheduler(job, model, 0, 0).next_requests(0))
    stream = endless_problems(job.tasks, "train", seed_of(job.run.seed, "rl"))
    seeds: dict[str, set[int]] = {}
    for (_, problem), request in zip(stream, requests.values(), strict=False):
        seeds.setdefault(problem.problem_id, set()).add(request.seed)
    assert min(map(len, seeds.values())) > 1


def test_prompts_that_leave_no_room_are_dropped(model):
    job = job_of(model, dynamic_sampling=False)
    lengths = {len(request.prompt_ids) for _, request in RolloutScheduler(job, model, 0, 0).next_requests(0)}
    assert len(lengths) == 1
    (length,) = lengths
    document = job.model_dump()
    document["generator"] |= {"max_new_tokens": 1, "max_model_len": length}
    scheduler = RolloutScheduler(Job(**document), model, 0, 0)
    with pytest.raises(RuntimeError, match=r"^step 0: .*generator\.max_model_len"):
        scheduler.next_requests(0)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0), (16384, 0), (16385, -1 / 4096), (18432, -0.5), (20480, -1), (20481, -1), (10**9, -1)],
)
def test_soft_overlong_penalty_at_the_lengths_of_the_paper(num_tokens, expected):
    assert soft_overlong_penalty(num_tokens, max_tokens=20480, buffer_tokens=4096) == expected
