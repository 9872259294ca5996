"""A run of stage `rl` for the tests of several folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.rl.runs import run_cut_off
from tests.tiny_job import tiny_job

STEPS = 8
ON_POLICY: dict[str, dict[str, Any]] = {
    "run": {"seed": 7},
    "rl": {"steps": STEPS, "prompts_per_step": 4, "group_size": 4, "learning_rate": 1e-3, "dynamic_sampling": True},
    "learner": {"cpus_per_worker": 0.5, "save_every": 2},
    "evaluation": {"num_problems": 6, "samples_per_problem": 4, "ks": [1]},
}


@pytest.fixture(scope="session")
def on_policy_job(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write the job of an on-policy run of STEPS steps, with these keys in its sections."""

    def write(**sections: dict[str, Any]) -> Path:
        merged = {name: ON_POLICY.get(name, {}) | sections.get(name, {}) for name in {**ON_POLICY, **sections}}
        return tiny_job(tmp_path_factory.mktemp("rl"), tiny_model(True), **merged)

    return write


@pytest.fixture(scope="session")
def recorded_rl(on_policy_job: Callable[..., Path], ray_session: None) -> Path:
    """The job of a recorded and evaluated run that was interrupted and resumed. The batches that were recorded before
    the interruption are in the folder `before` beside it."""
    job = on_policy_job(rl={"record": True, "eval_every": 3})
    run_cut_off("rl", job, STEPS)
    return job
