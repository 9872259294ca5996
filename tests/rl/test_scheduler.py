"""Every problem to exactly one step, in the order of the stream, under weights that are new enough,
in whatever order answers and verdicts come."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.config import Job
from pear_ray.records import Completion, Grade
from pear_ray.rl.scheduler import MAX_DRAWS, RolloutScheduler, batch_metrics
from pear_ray.seeds import seed_of
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


def answers_at(version: int) -> tuple[Completion, ...]:
    return tuple(
        Completion((5, 6, 1), (-1.0, -2.0, -0.5), f"answer {n}", "stop", ((version, 3),))
        for n in range(GROUP)
    )


def verdicts_of(has_signal: bool) -> list[Grade]:
    return [Grade(float(n == 0 and has_signal), n == 0 and has_signal) for n in range(GROUP)]


def names(job: Job, count: int) -> list[str]:
    stream = endless_problems(job.tasks, "train", seed_of(job.run.seed, "rl"))
    return [problem.problem_id for _, problem in islice(stream, count)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3), st.booleans(), st.integers(0, 2**32), st.floats(0.4, 1), st.integers(0, 4)
)  # fmt: skip
def test_each_problem_goes_to_one_step(model, staleness, replaces, seed, signal, first_step):
    """A run by chance: learners are somewhere, answers and verdicts come in any order."""
    draw = random.Random(seed)
    job = job_of(model, max_staleness=staleness, dynamic_sampling=replaces)
    first_problem = 3 * first_step
    scheduler = RolloutScheduler(job, model, first_step, first_problem)
    version, lessons, sampled, judged = first_step, [], {}, {}
    waiting: list[tuple[int, int]] = []
    answered: list[int] = []
    while len(lessons) < job.rl.steps - first_step:
        newest_of_engine = draw.randint(first_step, version)
        for position, request in scheduler.next_requests(version):
            assert position not in sampled
            assert request.min_version <= version
            # Engines hold what they may not answer yet.
            sampled[position] = max(request.min_version, newest_of_engine)
            waiting.append((position, sampled[position]))
        draw.shuffle(waiting)
        for _ in range(draw.randint(0, len(waiting))):
            position, wrote = waiting.pop()
            pairs = scheduler.add_completions(position, answers_at(wrote))
            assert len(pairs) == GROUP
            answered.append(position)
        draw.shuffle(answered)
        for _ in range(draw.randint(0, len(answered))):
            position = answered.pop()
            judged[position] = draw.random() < signal
            scheduler.add_rewards(position, verdicts_of(judged[position]))
        while (batch := scheduler.pop_batch()) is not None:
            lessons.append(batch)
        # Learners take what is there, one step at a time.
        if version < first_step + len(lessons):
            version += draw.randint(0, 1)
    ends = [first_problem, *(batch.next_problem for batch in lessons)]
    stream = names(job, ends[-1])
    for number, batch in enumerate(lessons):
        assert batch.step == first_step + number
        assert (batch.first_problem, batch.next_problem) == tuple(ends[number : number + 2])
        own = range(batch.first_problem, batch.next_problem)
        kept = [n for n in own if judged[n] or not replaces]
        assert [group.problem_id for group in batch.groups] == [stream[n] for n in kept]
        assert list(batch.dropped) == [stream[n] for n in own if n not in kept]
        assert len(kept) == PROBLEMS
        assert all(batch.step - sampled[n] <= staleness for n in kept)
        assert batch_metrics(batch)["staleness_max"] <= staleness


def test_nothing_is_asked_that_no_step_will_learn_from(model):
    job = job_of(model, steps=2, max_staleness=5)
    scheduler = RolloutScheduler(job, model, 0, 0)
    assert len(scheduler.next_requests(0)) == 2 * PROBLEMS
    assert scheduler.next_requests(0) == scheduler.next_requests(1) == []


def test_on_policy_a_group_is_replaced_once_all_are_judged(model):
    scheduler = RolloutScheduler(job_of(model, dynamic_sampling=True), model, 0, 0)
    asked = scheduler.next_requests(0)
    for position, _ in asked:
        scheduler.add_completions(position, answers_at(0))
    for position, _ in asked[:-1]:
        scheduler.add_rewards(position, verdicts_of(has_signal=False))
        assert scheduler.next_requests(0) == []
    scheduler.add_rewards(asked[-1][0], verdicts_of(has_signal=True))
    assert [position for position, _ in scheduler.next_requests(0)] == [PROBLEMS, PROBLEMS + 1]


def test_overlapped_a_group_is_replaced_at_once(model):
    job = job_of(model, dynamic_sampling=True, max_staleness=1)
    scheduler = RolloutScheduler(job, model, 0, 0)
    (first, _), *others = scheduler.next_requests(0)
    assert len(others) == 2 * PROBLEMS - 1
    scheduler.add_completions(first, answers_at(0))
    scheduler.add_rewards(first, verdicts_of(has_signal=False))
    assert [position for position, _ in scheduler.next_requests(0)] == [2 * PROBLEMS]


def test_problems_that_never_give_a_signal_end_the_run(model):
    scheduler = RolloutScheduler(job_of(model, dynamic_sampling=True), model, 0, 0)
    with pytest.raises(RuntimeError, match="step 0: 61 problems were of no use") as raised:
        for _ in range(MAX_DRAWS + 2):
            for position, _ in scheduler.next_requests(0):
                scheduler.add_completions(position, answers_at(0))
                scheduler.add_rewards(position, verdicts_of(has_signal=False))
            assert scheduler.pop_batch() is None
    assert "rl.dynamic_sampling" in str(raised.value)


def test_long_answers_earn_less(model):
    """Of at most 8 tokens the last 6 count: an answer of 3 loses a sixth."""
    job = job_of(model, overlong_buffer_tokens=6, advantage="dr_grpo")
    scheduler = RolloutScheduler(job, model, 0, 0)
    for position, _ in scheduler.next_requests(0):
        short, long = answers_at(0)
        short = Completion((5, 1), (-1.0, -2.0), "short", "stop", ((0, 2),))
        scheduler.add_completions(position, (short, long))
        scheduler.add_rewards(position, [Grade(1.0, True), Grade(1.0, True)])
    batch = scheduler.pop_batch()
    assert batch is not None
    for group in batch.groups:
        assert group.advantages == pytest.approx((1 / 12, -1 / 12))
        assert [grade.reward for grade in group.grades] == [1.0, 1.0]


def test_the_same_problem_gets_another_seed_in_another_epoch(model):
    job = job_of(model, steps=10**6, max_staleness=400)
    requests = dict(RolloutScheduler(job, model, 0, 0).next_requests(0))
    stream = endless_problems(job.tasks, "train", seed_of(job.run.seed, "rl"))
    seeds: dict[str, set[int]] = {}
    for (_, problem), request in zip(stream, requests.values(), strict=False):
        seeds.setdefault(problem.problem_id, set()).add(request.seed)
    assert min(map(len, seeds.values())) > 1


def test_a_prompt_that_leaves_no_room_is_passed_over(model):
    """Prompts of Countdown have 6 to 8 tokens here; the longest ones do not fit."""
    job = job_of(model, dynamic_sampling=False)
    lengths = {
        len(request.prompt_ids)
        for _, request in RolloutScheduler(job, model, 0, 0).next_requests(0)
    }
    assert len(lengths) == 1
    (length,) = lengths
    document = job.model_dump()
    document["generator"] |= {"max_new_tokens": 1, "max_model_len": length}
    scheduler = RolloutScheduler(Job(**document), model, 0, 0)
    with pytest.raises(RuntimeError, match=r"of no use: .*generator\.max_model_len"):
        scheduler.next_requests(0)
