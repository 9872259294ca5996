"""What the stage reads of a job."""

from __future__ import annotations

from pear_ray.config import Cooperate, Job


def settings_of(job: Job) -> Cooperate:
    """[cooperate], which a job with this stage has."""
    assert job.cooperate is not None
    return job.cooperate


def traces_job(job: Job) -> Job:
    """The job as those see it who read and weigh traces: [sft] is what holds for them here."""
    return job.model_copy(update={"sft": settings_of(job).sft_of(job.sft)})
