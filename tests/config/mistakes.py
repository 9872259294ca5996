"""The smallest job, and the mistakes found in a change of it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pear_ray.config import Job, describe

DOCUMENT = {
    "run": {"dir": "runs/one"},
    "model": {"path": "./model"},
    "generator": {"max_new_tokens": 8, "max_model_len": 16},
    "tasks": [{"name": "countdown"}],
}


def job_of(**sections: Any) -> Job:
    return Job(**DOCUMENT | sections)


def mistakes_in(**sections: Any) -> list[str]:
    with pytest.raises(ValidationError) as refusal:
        job_of(**sections)
    return describe(refusal.value, Job)


def assert_one_mistake(expected: str, **sections: Any) -> None:
    """The job has one mistake, whose line begins with `expected`."""
    (line,) = mistakes_in(**sections)
    assert line.startswith(expected), line
