"""The Ray cluster a stage runs on."""

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
    """Join the cluster that RAY_ADDRESS names or that runs on this machine; else start one here.

    Without a runtime environment of its own: workers that Ray keeps ready would be of no use, and
    each process would take two seconds longer to start. What a job's processes should find in
    their environment (HF_TOKEN, HF_HOME) belongs to the nodes: runtime environments are kept and
    shown by Ray.
    """
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)


def set_job_status(message: str, **facts: str) -> None:
    """Show a message on the dashboard's page of the job and put facts among its metadata, where
    `ray job` finds them too. Nothing happens in a process that was not submitted as a job."""
    submitted = os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR)
    if submitted is None:
        return
    connect()
    name = json.loads(submitted)["metadata"]["job_submission_id"]
    jobs = JobInfoStorageClient(ray._private.worker.global_worker.gcs_client)

    async def put() -> None:
        known = await jobs.get_info(name)
        told = {"metadata": (known.metadata or {}) | facts}
        await jobs.put_status(name, JobStatus.RUNNING, message, jobinfo_replace_kwargs=told)

    try:
        asyncio.run(put())
    except (RuntimeError, RayError) as error:
        # A job that is being stopped takes no more messages.
        log.warning("the dashboard cannot be told %r: %s", message, error)


def draining_nodes() -> set[str]:
    """Ids of nodes that are going to be taken back: spot machines with a notice, nodes that an
    autoscaler or an operator empties. Ray Train asks in the same way."""
    return set(ray._private.state.state.get_draining_nodes())


def here() -> NodeAffinitySchedulingStrategy:
    """For an actor that should live and die with the process that starts it: on the same node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
