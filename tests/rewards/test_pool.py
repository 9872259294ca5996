"""Verdicts from a pool of processes: in order, and still given when answers hang, fill or end the
processes, or when something else does."""

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

SPECS = (
    TaskSpec(name="countdown", options={"max_number": 9}),
    TaskSpec(name="tests.rewards.troublesome:Troublesome"),
)
SETTINGS = Rewards(processes=2, timeout_seconds=0.5, memory_mib=256)
# Beyond this a process is killed: 0.5 s for the verdict, 1 s for the call, 5 s of grace.
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


def without_verdict(reason):
    return Grade(0.0, False, {}, f"no verdict: {reason}")


@pytest.fixture(scope="module")
def pool(ray_session):
    with RewardPool(SPECS, SETTINGS) as started:
        yield started


@pytest.fixture
def reward_pool(pool):
    """The pool with all of its processes idle. It notices that one has died when it has work."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert pool.grade(answers("right", "wrong")) == [RIGHT, WRONG]
        if titles() == ["ray::RewardWorker"] * 2:
            return pool
        time.sleep(0.1)
    raise AssertionError(f"the pool's processes are {titles()}")


def processes():
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, FileNotFoundError):
            # A process that has just ended has no words any more.
            if "ray::RewardWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def titles():
    return [process.name() for process in processes()]


def collect(pool, num_keys, seconds):
    """What `finished` gives until there are so many keys."""
    found, deadline = {}, time.monotonic() + seconds
    while len(found) < num_keys and time.monotonic() < deadline:
        for key, grades in pool.finished(0.2):
            assert key not in found
            found[key] = grades
    return found


def test_verdicts_come_in_order(reward_pool):
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
        ("nothing", "TypeError: grade: read NoneType, expected a Grade"),
        ("no_number", "ValueError: reward: read nan, expected a finite number"),
        ("unknown", "AttributeError: 'Troublesome' object has no attribute 'unknown'"),
    ],
)
def test_an_answer_that_cannot_be_judged_costs_its_own_verdict(reward_pool, text, reason):
    before = {process.pid for process in processes()}
    grades = reward_pool.grade(answers("right", text, "wrong", text, "right"))
    cut = without_verdict(reason)
    assert grades == [RIGHT, cut, WRONG, cut, RIGHT]
    assert {process.pid for process in processes()} == before


def test_judges_reach_the_network_where_the_job_lets_them():
    with RewardPool(SPECS, Rewards(processes=1, network=True)) as pool:
        (grade,) = pool.grade(answers("call_out"))
    assert grade == without_verdict("ConnectionRefusedError: [Errno 111] Connection refused")


def test_a_verdict_that_cannot_travel_costs_no_other(reward_pool):
    first, second, third = reward_pool.grade(answers("right", "no_message", "wrong"))
    assert (first, third) == (RIGHT, WRONG)
    assert second.note.startswith("no verdict: ") and second.reward == 0 and not second.parts


def test_a_process_that_must_be_killed_takes_no_other_verdict_with_it(reward_pool):
    began = time.monotonic()
    reward_pool.submit("trouble", answers("right", "loop_in_c", "wrong", "end_process", "right"))
    for number in range(40):
        reward_pool.submit(number, answers("wrong", "right"))
    assert time.monotonic() - began < 1.0
    assert reward_pool.num_waiting == 85
    found = collect(reward_pool, 41, 45)
    late = without_verdict("TimeoutError: more than rewards.timeout_seconds = 0.5 s")
    ended = without_verdict("RuntimeError: its process ended 2 times, judging it alone")
    assert found.pop("trouble") == [RIGHT, late, WRONG, ended, RIGHT]
    assert found == {number: [WRONG, RIGHT] for number in range(40)}
    assert reward_pool.num_waiting == 0


@pytest.mark.parametrize(("number", "how_many"), [(signal.SIGKILL, 2), (signal.SIGSTOP, 1)])
def test_a_process_that_something_else_ends_is_replaced(reward_pool, number, how_many):
    texts = ["slow 0.05", "wrong"] * 20
    reward_pool.submit("work", answers(*texts))
    victims = processes()[:how_many]
    time.sleep(0.2)
    for process in victims:
        os.kill(process.pid, number)
    found = collect(reward_pool, 1, 2 * SECONDS_TO_KILL + 20)
    assert found == {"work": [RIGHT, WRONG] * 20}
    assert psutil.wait_procs(victims, timeout=20)[1] == []


def test_an_answer_that_was_alone_when_its_process_was_killed_is_judged_again(reward_pool):
    reward_pool.submit("alone", answers("slow 0.4"))
    for process in processes():
        os.kill(process.pid, signal.SIGKILL)
    assert collect(reward_pool, 1, 30) == {"alone": [RIGHT]}


def test_what_is_ready_comes_at_once_and_nothing_is_waited_for_in_vain(reward_pool):
    began = time.monotonic()
    assert reward_pool.finished(30.0) == []
    reward_pool.submit("empty", [])
    assert reward_pool.finished(30.0) == [("empty", [])]
    reward_pool.submit("slow", answers("slow 0.45"))
    assert reward_pool.finished(0.0) == []
    assert reward_pool.num_waiting == 1
    assert reward_pool.finished(30.0) == [("slow", [RIGHT])]
    assert time.monotonic() - began < 5


def test_a_blocking_call_leaves_the_stream_alone(reward_pool):
    reward_pool.submit("before", answers("wrong"))
    assert reward_pool.grade(answers("right", "right")) == [RIGHT, RIGHT]
    assert collect(reward_pool, 1, 10) == {"before": [WRONG]}


def test_a_slow_answer_does_not_hold_up_those_behind_it(reward_pool):
    """Answers that share a call with slow ones go on to other processes after a second."""
    began = time.monotonic()
    grades = reward_pool.grade(answers(*["slow 0.25"] * 16))
    assert grades == [RIGHT] * 16
    assert time.monotonic() - began < 0.9 * 16 * 0.25


def test_a_thousand_groups_are_judged_once_each(reward_pool):
    group = [(COUNTDOWN, "undo 30 - 9 = 20")] * 8
    (right,) = reward_pool.grade(group[:1])
    found = {}
    for number in range(1000):
        reward_pool.submit(number, group)
        found |= reward_pool.finished(0.0)
    while reward_pool.num_waiting:
        found |= reward_pool.finished(60.0)
    assert found == {number: [right] * 8 for number in range(1000)}


def test_tasks_that_no_process_can_make_end_the_wait():
    bad = (TaskSpec(name="countdown", options={"max_number": 90}),)
    with RewardPool(bad, Rewards(processes=3)) as pool:
        pool.submit("one", answers("right"))
        with pytest.raises(
            RuntimeError, match=r"failed to start 3 times: [^$]*max_result: read 99"
        ):
            pool.finished(60.0)


def test_a_closed_pool_leaves_no_process():
    before = {process.pid for process in processes()}
    with RewardPool(SPECS, Rewards(processes=1)) as pool:
        pool.grade(answers("right"))
        own = [process for process in processes() if process.pid not in before]
        assert own
    assert psutil.wait_procs(own, timeout=20)[1] == []
