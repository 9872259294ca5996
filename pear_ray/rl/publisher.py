"""A learner rank's client of the registry and the queue."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from torch import Tensor

from pear_ray.data.batch_queue import GRACE_SECONDS, QueueClosed, take_batch
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.rl.train_step import RankConfig
from pear_ray.train.ray_train import rank_and_world_size
from pear_ray.weights.publish import Publisher
from pear_ray.weights.types import RankShard

# How often a rank that waits for rollouts asks whether the registry still knows its weights.
POLL_SECONDS = 5.0

# (name, shape, this rank's partition) of each parameter
Partitions = Callable[[], Iterator[tuple[str, tuple[int, ...], Tensor]]]


class WeightPublisher:
    """Publishes this rank's shard of each version and takes batches. It keeps the last shards, so that it can announce
    them to a registry that restarted."""

    def __init__(self, config: RankConfig, partitions: Partitions) -> None:
        self._job = config.job
        self._registry = config.registry
        self._queue = config.queue
        self._partitions = partitions
        self._rank, self._num_ranks = rank_and_world_size()
        weights = config.job.weights
        self._publisher = Publisher(self._rank, weights.bucket_mib, weights.full_every)
        self._shards: list[RankShard] = []
        self._next_problem = 0
        self._attempt: str = broadcast_from_first_rank(uuid.uuid4().hex)

    def publish(self, version: int, next_problem: int) -> int:
        """Put this rank's shard into the object store and announce it; return its bytes."""
        full = self._requested_update(version) == "full"
        return self._publish(version, next_problem, full)

    def take(self, step: int) -> RolloutBatch | None:
        """Wait for the batch of a step; None if the generator side has failed.

        Raises:
            TimeoutError: it did not come within `learner.timeout_seconds`.
            RuntimeError: a token of it is older than `rl.max_staleness` allows.
        """
        timeout_seconds = self._job.learner.timeout_seconds
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                rollouts: RolloutBatch = take_batch(self._queue, step, min(POLL_SECONDS, timeout_seconds))
                break
            except QueueClosed:
                return None
            except TimeoutError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"learner.timeout_seconds: expected the rollouts of step {step} within"
                        f" {timeout_seconds:.0f} s, got none"
                    ) from error
            self._announce_again()
        staleness, limit = rollouts.metrics["staleness_max"], self._job.rl.max_staleness
        if staleness > limit:
            raise RuntimeError(
                f"step {step}: expected tokens sampled at most rl.max_staleness = {limit} steps"
                f" earlier, got {staleness:.0f}"
            )
        return rollouts

    def drop_before(self, step: int) -> None:
        """Have the queue drop batches that no rank will take again."""
        call = self._queue.drop_before.remote(step)
        ray.get(call, timeout=self._job.learner.timeout_seconds)

    def _announce_again(self) -> None:
        """Publish or announce the newest version again if the registry requests it."""
        newest = self._shards[-1].version
        request = self._requested_update(newest)
        # Ranks that announce a base and its delta again could miss each other forever.
        if request == "full" or (request == "announce" and len(self._shards) > 1):
            self._publish(newest, self._next_problem, full=True)
        elif request == "announce":
            self._announce(self._shards[0])

    def _publish(self, version: int, next_problem: int, full: bool) -> int:
        shard = self._publisher.publish(self._partitions(), version, full)
        # Shards held here stay in the store: only those an engine one version behind needs.
        self._shards = [old for old in self._shards if old.version == shard.base_version]
        self._shards.append(shard)
        self._next_problem = next_problem
        self._announce(shard)
        return shard.num_bytes

    def _announce(self, shard: RankShard) -> None:
        arguments = shard, self._num_ranks, self._next_problem, self._attempt
        call = self._registry.announce.remote(*arguments)
        ray.get(call, timeout=self._job.weights.timeout_seconds)

    def _requested_update(self, version: int) -> str:
        return ray.get(self._registry.requested_update.remote(version), timeout=GRACE_SECONDS)


def broadcast_from_first_rank(value: Any) -> Any:
    """Return the first rank's `value` on all ranks; collective."""
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]
