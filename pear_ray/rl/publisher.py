"""A rank's side of board and queue, and whether both sides hold the same weights."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from torch import Tensor

from pear_ray.config import Job
from pear_ray.data.batch_queue import GRACE_SECONDS, take
from pear_ray.losses.packing import pack
from pear_ray.records import TrainingBatch, TrainingSequence
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.train.ray_train import rank_and_count
from pear_ray.weights.publish import Publisher
from pear_ray.weights.types import RankShard

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner

# How long a rank waits for rollouts before it asks whether the board still knows its weights.
LOOK_SECONDS = 5.0

Partitions = Callable[[], Iterator[tuple[str, tuple[int, ...], Tensor]]]


class WeightPublisher:
    """A rank's side of board and queue. It keeps what it published last, so that a board which has
    died can be told again."""

    def __init__(self, job: Job, versions_actor: Any, queue: Any, partitions: Partitions) -> None:
        self.queue = queue
        self._job, self._board, self._partitions = job, versions_actor, partitions
        self._rank, self._num_ranks = rank_and_count()
        self._publisher = Publisher(self._rank, job.weights.bucket_mib, job.weights.full_every)
        self._shares: list[RankShard] = []
        self._next_problem = 0
        self._attempt: str = from_first_rank(uuid.uuid4().hex)

    def publish(self, version: int, next_problem: int) -> int:
        """Put this rank's part of the weights into the store and announce it; returns the bytes."""
        is_wanted_full = self._wish(version) == "full"
        return self._publish(version, next_problem, is_wanted_full)

    def take(self, step: int) -> RolloutBatch:
        """The rollouts of a step.

        Raises:
            TimeoutError: they did not come within `learner.timeout_seconds`.
            Closed: they will not come, since the rollouts failed; says why.
        """
        seconds = self._job.learner.timeout_seconds
        end = time.monotonic() + seconds
        while True:
            try:
                rollouts: RolloutBatch = take(self.queue, step, min(LOOK_SECONDS, seconds))
                return rollouts
            except TimeoutError as error:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"rollouts of step {step} did not come within {seconds:.0f} s"
                        " (learner.timeout_seconds)"
                    ) from error
            self._say_again()

    def _say_again(self) -> None:
        """Do what the board wishes, if it wishes anything."""
        newest = self._shares[-1].version
        requested_update = self._wish(newest)
        # Ranks that say two versions again could miss each other for ever: one whole version.
        if requested_update == "full" or (requested_update == "again" and len(self._shares) > 1):
            self._publish(newest, self._next_problem, full=True)
        elif requested_update == "again":
            self._announce(self._shares[0])

    def _publish(self, version: int, next_problem: int, full: bool) -> int:
        share = self._publisher.publish(self._partitions(), version, full)
        # What is kept here stays in the store: no more than an engine needs that is one behind.
        self._shares = [old for old in self._shares if old.version == share.base_version]
        self._shares.append(share)
        self._next_problem = next_problem
        self._announce(share)
        return share.num_bytes

    def _announce(self, share: RankShard) -> None:
        call = self._board.announce.remote(
            share, self._num_ranks, self._next_problem, self._attempt
        )
        ray.get(call, timeout=self._job.weights.timeout_seconds)

    def _wish(self, version: int) -> str:
        return ray.get(self._board.requested_update.remote(version), timeout=GRACE_SECONDS)


class ParityCheck:
    """The learner's log-probs of the probe under its last weights, beside the generators'."""

    def __init__(self, job: Job, learner: Learner) -> None:
        self._job, self._learner = job, learner
        self._ours: dict[int, list[np.ndarray]] = {}

    def check(self, step: int, rollouts: RolloutBatch) -> float | None:
        """Largest difference, in nats, over the loads of weights that rollouts tell of; None where
        there is none that this learner can judge. Every rank scores all of the probe, so that none
        has to tell the others.

        Raises:
            RuntimeError: it is too large: the two sides do not hold the same weights.
        """
        if rollouts.probe:
            self._ours[step] = self._logprobs(rollouts.probe)
        for version in [v for v in self._ours if v < step - self._job.rl.max_staleness - 1]:
            del self._ours[version]
        largest = None
        for version, theirs in rollouts.probed:
            if version not in self._ours:
                continue
            pairs = zip(self._ours[version], theirs, strict=True)
            gap = max(float(np.abs(one - other).max()) for one, other in pairs)
            largest = max(gap, largest or 0.0)
            if not gap <= self._job.weights.max_logprob_gap:
                raise RuntimeError(
                    f"step {step}: generator and learner differ by {gap:.2e} nats on the probe"
                    f" under weights version {version}; expected at most"
                    f" weights.max_logprob_gap = {self._job.weights.max_logprob_gap}"
                )
        return largest

    def _logprobs(self, probe: Sequence[TrainingSequence]) -> list[np.ndarray]:
        # By place, not by problem: a sequence is known by its number.
        numbered = [replace(sequence, origin=str(n)) for n, sequence in enumerate(probe)]
        batches: list[TrainingBatch] = pack(numbered, 1, self._job.learner.tokens_per_pack)[0]
        found: dict[int, np.ndarray] = {}
        for batch, logprobs in zip(batches, self._learner.logprobs(batches), strict=True):
            owners = batch.sequence_ids_T[batch.trainable_T]
            for place, origin in enumerate(batch.origins):
                found[int(origin)] = logprobs[owners == place]
        return [found[number] for number in range(len(probe))]


def from_first_rank(value: Any) -> Any:
    """The same on all ranks: what the first one has."""
    held = [value]
    torch.distributed.broadcast_object_list(held)
    return held[0]
