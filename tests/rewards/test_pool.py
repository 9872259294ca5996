"""Grades from a pool of workers: in order, whatever hangs, exhausts or kills a worker."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import psutil
import pytest

from pear_ray.config import Rewards, TaskSpec
from pear_ray.records import Grade, Problem
from pear_ray.rewards.pool import MAX_ANSWERS_PER_CALL, RewardPool

pytestmark = pytest.mark.usefixtures("ray_session")

SPECS = (TaskSpec(name="countdown", options={"max_number": 9}), TaskSpec(name="tests.rewards.troublesome:Troublesome"))
SETTINGS = Rewards(processes=2, timeout_seconds=0.5, memory_mib=256)
# A worker is killed after 0.5 s for the grade, 1 s for the call and 5 s of grace.
SECONDS_TO_KILL = 6.5
COUNTDOWN = Problem(
    problem_id="countdown-3-7-9-30",
    task="countdown",
    messages=({"role": "user", "content": "3 7 9 > 30 :"},),
    reference="3 7 9 > 30",
    split="train",
)
TROUBLE = Problem("troublesome-1", "troublesome", (), "", "train")
RIGHT, WRONG = Grade(1.0, True), Grade(0.0, False, note="wrong")


def answers(*texts):
    return [(TROUBLE, text) for text in texts]


def failed(reason):
    return Grade(0.0, False, {}, f"not graded: {reason}")


@pytest.fixture(scope="module")
def pool(ray_session):
    with RewardPool(SPECS, SETTINGS) as started:
        yield started


@pytest.fixture
def reward_pool(pool):
    """Return the pool once all workers are idle: it notices a death only when it has work."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert pool.grade(answers("right", "wrong")) == [RIGHT, WRONG]
        if titles() == ["ray::RewardWorker"] * 2:
            return pool
        time.sleep(0.1)
    raise AssertionError(f"workers: expected 2, got {titles()}")


def processes():
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, FileNotFoundError):
            # The command line of a process that just ended is empty.
            if "ray::RewardWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def titles():
    return [process.name() for process in processes()]


def collect(pool, num_keys, seconds):
    """Return the finished groups by key, until there are `num_keys`."""
    found, deadline = {}, time.monotonic() + seconds
    while len(found) < num_keys and time.monotonic() < deadline:
        for key, grades in pool.pop_finished(0.2):
            assert key not in found
            found[key] = grades
    return found


def test_grades_come_in_order(reward_pool):
    right, wrong = "undo 30 - 9 = 21 , 21 / 3 = 7", "undo 30 - 9 = 20"
    texts = [right if number % 3 else wrong for number in range(2 * MAX_ANSWERS_PER_CALL + 7)]
    grades = reward_pool.grade([(COUNTDOWN, text) for text in texts])
    assert [grade.correct for grade in grades] == [text == right for text in texts]
    assert reward_pool.grade([]) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("loop", "TimeoutError: more than rewards.timeout_seconds = 0.5 s"),
        ("slow 60", "TimeoutError: more than rewards.timeout_seconds = 0.5 s"),
        ("fill_memory", "MemoryError: more than rewards.memory_mib = 256 MiB"),
        ("ask_to_exit", "SystemExit: 3"),
        ("fail", "LookupError: no such thing"),
        ("call_out", "PermissionError: [Errno 13] Permission denied"),
        ("call_out_through_another", "PermissionError: denied"),
        ("nothing", "TypeError: grade: expected a Grade, got NoneType"),
        ("no_number", "ValueError: reward: expected a finite number, got nan"),
        ("unknown", "AttributeError: 'Troublesome' object has no attribute 'unknown'"),
    ],
)
def test_an_answer_that_cannot_be_graded_fails_alone(reward_pool, text, reason):
    before = {process.pid for process in processes()}
    grades = reward_pool.grade(answers("right", text, "wrong", text, "right"))
    grade = failed(reason)
    assert grades == [RIGHT, grade, WRONG, grade, RIGHT]
    assert {process.pid for process in processes()} == before


def test_graders_reach_the_network_if_the_job_allows_it():
    with RewardPool(SPECS, Rewards(processes=1, network=True)) as pool:
        (grade,) = pool.grade(answers("call_out"))
    assert grade == failed("ConnectionRefusedError: [Errno 111] Connection refused")


def test_a_grade_that_cannot_be_pickled_fails_alone(reward_pool):
    first, second, third = reward_pool.grade(answers("right", "no_message", "wrong"))
    assert (first, third) == (RIGHT, WRONG)
    assert second.note.startswith("not graded: ") and second.reward == 0 and not second.parts


def test_a_killed_worker_costs_only_the_grade_of_the_answer_to_blame(reward_pool):
    began = time.monotonic()
    reward_pool.submit("trouble", answers("right", "loop_in_c", "wrong", "end_process", "right"))
    for number in range(40):
        reward_pool.submit(number, answers("wrong", "right"))
    assert time.monotonic() - began < 1.0
    assert reward_pool.num_waiting == 85
    found = collect(reward_pool, 41, 45)
    late = failed("TimeoutError: more than rewards.timeout_seconds = 0.5 s")
    fatal = failed("RuntimeError: its worker died 2 times, grading it alone")
    assert found.pop("trouble") == [RIGHT, late, WRONG, fatal, RIGHT]
    assert found == {number: [WRONG, RIGHT] for number in range(40)}
    assert reward_pool.num_waiting == 0


@pytest.mark.parametrize(("number", "num_victims"), [(signal.SIGKILL, 2), (signal.SIGSTOP, 1)])
def test_a_worker_killed_or_stopped_from_outside_is_replaced(reward_pool, number, num_victims):
    texts = ["slow 0.05", "wrong"] * 20
    reward_pool.submit("work", answers(*texts))
    victims = processes()[:num_victims]
    time.sleep(0.2)
    for process in victims:
        os.kill(process.pid, number)
    found = collect(reward_pool, 1, 2 * SECONDS_TO_KILL + 20)
    assert found == {"work": [RIGHT, WRONG] * 20}
    assert psutil.wait_procs(victims, timeout=20)[1] == []


def test_an_answer_alone_in_a_killed_worker_is_graded_again(reward_pool):
    reward_pool.submit("alone", answers("slow 0.4"))
    for process in processes():
        os.kill(process.pid, signal.SIGKILL)
    assert collect(reward_pool, 1, 30) == {"alone": [RIGHT]}


def test_pop_finished_waits_only_while_answers_wait(reward_pool):
    began = time.monotonic()
    assert reward_pool.pop_finished(30.0) == []
    reward_pool.submit("empty", [])
    assert reward_pool.pop_finished(30.0) == [("empty", [])]
    reward_pool.submit("slow", answers("slow 0.45"))
    assert reward_pool.pop_finished(0.0) == []
    assert reward_pool.num_waiting == 1
    assert reward_pool.pop_finished(30.0) == [("slow", [RIGHT])]
    assert time.monotonic() - began < 5


def test_a_blocking_grade_leaves_submitted_answers_alone(reward_pool):
    reward_pool.submit("before", answers("wrong"))
    assert reward_pool.grade(answers("right", "right")) == [RIGHT, RIGHT]
    assert collect(reward_pool, 1, 10) == {"before": [WRONG]}


def test_slow_answers_do_not_delay_those_behind_them(reward_pool):
    """Answers that share a call with slow ones go to other workers after a second."""
    began = time.monotonic()
    grades = reward_pool.grade(answers(*["slow 0.25"] * 16))
    assert grades == [RIGHT] * 16
    assert time.monotonic() - began < 0.9 * 16 * 0.25


def test_a_thousand_groups_are_graded_once_each(reward_pool):
    group = [(COUNTDOWN, "undo 30 - 9 = 20")] * 8
    (right,) = reward_pool.grade(group[:1])
    found = {}
    for number in range(1000):
        reward_pool.submit(number, group)
        found |= reward_pool.pop_finished(0.0)
    while reward_pool.num_waiting:
        found |= reward_pool.pop_finished(60.0)
    assert found == {number: [right] * 8 for number in range(1000)}


def test_tasks_that_no_worker_can_build_raise():
    bad = (TaskSpec(name="countdown", options={"max_number": 90}),)
    with RewardPool(bad, Rewards(processes=3)) as pool:
        pool.submit("one", answers("right"))
        with pytest.raises(RuntimeError, match=r"failed to start 3 times: [^$]*max_result"):
            pool.pop_finished(60.0)


def test_a_closed_pool_leaves_no_worker():
    before = {process.pid for process in processes()}
    with RewardPool(SPECS, Rewards(processes=1)) as pool:
        pool.grade(answers("right"))
        own = [process for process in processes() if process.pid not in before]
        assert own
    assert psutil.wait_procs(own, timeout=20)[1] == []
