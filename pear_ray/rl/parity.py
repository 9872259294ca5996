"""Engine/trainer log-prob parity: both sides score the same sequences under the same version.

The difference is 0 up to rounding if every weight arrived and both forward passes agree. One
completion for each of the first problems is scored throughout the run.
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
from pear_ray.rl.scheduler import StepBatch

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner

NUM_PARITY_SEQUENCES = 8


class ParityProbe:
    """Engine side: the sequences that every engine scores right after each weight update."""

    def __init__(self) -> None:
        self.sequences: tuple[TrainingSequence, ...] = ()

    def choose(self, batch: StepBatch) -> None:
        """Take the sequences from the first batch."""
        if not self.sequences:
            groups = batch.groups[:NUM_PARITY_SEQUENCES]
            self.sequences = tuple(parity_sequence(group) for group in groups)

    @property
    def requests(self) -> list[ScoreRequest]:
        """Return the sequences as requests to an engine."""
        return [score_request(sequence) for sequence in self.sequences]


class ParityCheck:
    """Learner side: its own log-probs of the sequences, compared with the engines'."""

    def __init__(self, job: Job, learner: Learner) -> None:
        self._job = job
        self._learner = learner
        self._logprobs: dict[int, list[np.ndarray]] = {}

    def check(
        self,
        step: int,
        sequences: Sequence[TrainingSequence],
        updates: Sequence[WeightUpdateResult],
    ) -> float | None:
        """Score `sequences` with the weights before `step`; return the largest difference, in nats,
        to the engines' log-probs in `updates`. None if no update is to a version scored here.

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
                    f"step {step}: expected log-probs of engine and learner under version"
                    f" {update.version} to differ by at most weights.max_logprob_gap = {limit},"
                    f" got {gap:.2e} nats"
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


def parity_sequence(group: RolloutGroup) -> TrainingSequence:
    """Return the first completion of a group, its demonstration prefix included."""
    completion = group.completions[0]
    return TrainingSequence.of(
        group.prompt_ids,
        completion.prefix_ids + completion.token_ids,
        completion.prefix_logprobs + completion.logprobs,
        1.0,
        group.problem_id,
    )


def score_request(sequence: TrainingSequence) -> ScoreRequest:
    """Return the request to score the trainable tokens of a sequence."""
    ids, trainable = sequence.token_ids, sequence.trainable
    return ScoreRequest(tuple(ids[~trainable].tolist()), tuple(ids[trainable].tolist()))
