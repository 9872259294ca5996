"""Engine/trainer log-prob parity: both sides score the same sequences under the same version.

The difference is 0 up to rounding if every weight arrived and both forward passes agree. One completion for each of the
first problems is scored throughout the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pear_ray.config import Job
from pear_ray.engines.engine_actor import WeightUpdateResult
from pear_ray.engines.generator import ScoreRequest
from pear_ray.losses.packing import pack
from pear_ray.records import RolloutGroup, TrainingSequence

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner

NUM_PARITY_SEQUENCES = 8


def parity_sequences(groups: Sequence[RolloutGroup]) -> tuple[TrainingSequence, ...]:
    """Return the first completion of each of the first groups, demonstration prefixes included."""
    return tuple(
        TrainingSequence.of(
            group.prompt_ids,
            group.completions[0].prefix_ids + group.completions[0].token_ids,
            group.completions[0].prefix_logprobs + group.completions[0].logprobs,
            1.0,
            group.problem_id,
        )
        for group in groups[:NUM_PARITY_SEQUENCES]
    )


def score_request(sequence: TrainingSequence) -> ScoreRequest:
    """Return the request with which engines score a parity sequence after each weight update."""
    ids, trainable = sequence.token_ids, sequence.trainable
    return ScoreRequest(tuple(ids[~trainable].tolist()), tuple(ids[trainable].tolist()))


class ParityCheck:
    """Learner side: its own log-probs of the sequences, compared with the engines'."""

    def __init__(self, job: Job, learner: Learner) -> None:
        self._job = job
        self._learner = learner
        self._logprobs: dict[int, list[np.ndarray]] = {}

    def check(
        self, step: int, sequences: Sequence[TrainingSequence], updates: Sequence[WeightUpdateResult]
    ) -> float | None:
        """Score `sequences` with the weights before `step`; return the largest difference, in nats, to the engines'
        log-probs in `updates`. None if no update is to a version scored here.

        Every rank scores all sequences, so that ranks need not communicate.

        Raises:
            RuntimeError: the difference exceeds `weights.max_logprob_gap`.
        """
        if sequences:
            self._logprobs[step] = self._score(sequences)
        oldest = step - self._job.rl.max_staleness - 1
        self._logprobs = {v: scored for v, scored in self._logprobs.items() if v >= oldest}
        limit = self._job.weights.max_logprob_gap
        largest = None
        for update in updates:
            if update.version not in self._logprobs:
                continue
            pairs = zip(self._logprobs[update.version], update.parity_logprobs, strict=True)
            gap = max(float(np.abs(learner - engine).max()) for learner, engine in pairs)
            largest = max(gap, largest or 0.0)
            # Also raises for NaN.
            if not gap <= limit:
                raise RuntimeError(
                    f"step {step}: expected log-probs of engine and learner under version {update.version} to differ by"
                    f" at most weights.max_logprob_gap = {limit}, got {gap:.2e} nats"
                )
        return largest

    def _score(self, sequences: Sequence[TrainingSequence]) -> list[np.ndarray]:
        """Return the learner's log-probs of each sequence's trainable tokens."""
        # Problem ids may repeat: the number of the sequence identifies it.
        numbered = [replace(sequence, origin=str(n)) for n, sequence in enumerate(sequences)]
        batches = pack(numbered, 1, self._job.learner.tokens_per_pack)[0]
        scored: dict[int, np.ndarray] = {}
        for batch, logprobs in zip(batches, self._learner.logprobs(batches), strict=True):
            owners = batch.sequence_ids_T[batch.trainable_T]
            for position, origin in enumerate(batch.origins):
                scored[int(origin)] = logprobs[owners == position]
        return [scored[number] for number in range(len(sequences))]
