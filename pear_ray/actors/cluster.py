"""The Ray cluster a stage runs on."""

from __future__ import annotations

import logging

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names or that runs on this machine; else start one here.

    Without a runtime environment of its own: workers that Ray keeps ready would be of no use, and
    each process would take two seconds longer to start. What a job's processes should find in
    their environment (HF_TOKEN, HF_HOME) belongs to the nodes, or to `ray job submit
    --runtime-env-json`.
    """
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)


def draining_nodes() -> set[str]:
    """Ids of nodes that are going to be taken back: spot machines with a notice, nodes that an
    autoscaler or an operator empties. Ray Train asks in the same way."""
    return set(ray._private.state.state.get_draining_nodes())


def here() -> NodeAffinitySchedulingStrategy:
    """For an actor that should live and die with the process that starts it: on the same node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
