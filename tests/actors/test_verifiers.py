"""Verdicts from another process: in order, and still given when that process hangs or dies."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager

import psutil
import pytest

from pear_ray.actors.verifiers import Verifier
from pear_ray.config import TaskSpec
from pear_ray.records import Problem

pytestmark = pytest.mark.usefixtures("ray_session")

SPECS = (TaskSpec(name="countdown", options={"max_number": 9}),)
PROBLEM = Problem(
    problem_id="countdown-3-7-9-30",
    task="countdown",
    messages=({"role": "user", "content": "3 7 9 > 30 :"},),
    reference="3 7 9 > 30",
    split="train",
)
# No task can judge it: the call fails, whichever answers are in it.
UNJUDGEABLE = Problem("x-1", "countdown", PROBLEM.messages, reference="", split="train")
RIGHT, WRONG = "undo 30 - 9 = 21 , 21 / 3 = 7", "undo 30 - 9 = 20"


@contextmanager
def verifier(seconds_per_call=60.0):
    judge = Verifier(SPECS, seconds_per_call)
    try:
        assert judge.judge([(PROBLEM, RIGHT)])[0].correct
        yield judge
    finally:
        judge.close()


def its_process():
    (process,) = (
        p
        for p in psutil.Process().children(recursive=True)
        if p.name().startswith("ray::Verifier") or "ray::VerifierActor" in " ".join(p.cmdline())
    )
    return process


def test_verdicts_come_in_order():
    answers = [(PROBLEM, RIGHT if number % 3 else WRONG) for number in range(20)]
    with verifier() as judge:
        verdicts = judge.judge(answers)
        assert judge.judge([]) == []
    assert [verdict.correct for verdict in verdicts] == [bool(n % 3) for n in range(20)]


def test_a_verdict_that_fails_costs_no_other():
    answers = [(PROBLEM, RIGHT), (UNJUDGEABLE, RIGHT), (PROBLEM, WRONG), (PROBLEM, RIGHT)]
    with verifier() as judge:
        verdicts = judge.judge(answers)
    assert [verdict.correct for verdict in verdicts] == [True, False, False, True]
    assert verdicts[1].note.startswith("no verdict: ")
    assert verdicts[1].reward == 0
    assert not verdicts[2].note.startswith("no verdict")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_is_replaced(number):
    with verifier(seconds_per_call=8.0) as judge:
        process = its_process()
        os.kill(process.pid, number)
        verdicts = judge.judge([(PROBLEM, RIGHT), (PROBLEM, WRONG)])
        assert [verdict.correct for verdict in verdicts] == [True, False]
        process.wait(20)
