"""The Ray cluster of a job: connection, job status, draining nodes and placement."""

from __future__ import annotations

import asyncio
import json
import logging
import os

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.dashboard.modules.job.common import JobInfoStorageClient, JobStatus
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = logging.getLogger(__name__)


def connect() -> None:
    """Connect to the cluster of RAY_ADDRESS or on this machine, or start one.

    Without a runtime environment: with one, Ray cannot use its prestarted workers, and each process starts two seconds
    later. Secrets and caches (HF_TOKEN, HF_HOME) belong into the nodes' environment, because Ray stores and displays
    runtime environments.
    """
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)


def set_job_status(message: str, **metadata: str) -> None:
    """Show `message` on the job's dashboard page and add `metadata` to the job.

    Does nothing in a process that was not submitted as a Ray job.
    """
    config = os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR)
    if config is None:
        return
    connect()
    job_id = json.loads(config)["metadata"]["job_submission_id"]
    jobs = JobInfoStorageClient(ray._private.worker.global_worker.gcs_client)

    async def put_status() -> None:
        info = await jobs.get_info(job_id)
        changes = {"metadata": (info.metadata or {}) | metadata}
        await jobs.put_status(job_id, JobStatus.RUNNING, message, jobinfo_replace_kwargs=changes)

    try:
        asyncio.run(put_status())
    except (RuntimeError, RayError) as error:
        # A job that is being stopped accepts no status.
        log.warning("job status %r could not be set: %s", message, error)


def draining_nodes() -> set[str]:
    """Return the ids of nodes about to be removed: preempted, or drained by an autoscaler.

    Ray Train uses the same source.
    """
    return set(ray._private.state.state.get_draining_nodes())


def this_node_only() -> NodeAffinitySchedulingStrategy:
    """Return the strategy that places an actor on the caller's node, to share its fate."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
