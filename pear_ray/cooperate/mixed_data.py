"""Lessons of rollouts and of the corpus's next rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pear_ray.config import Job
from pear_ray.data.loader import steps
from pear_ray.data.scored_dataset import RowGroup, row_filter, sequences_of
from pear_ray.records import RolloutGroup
from pear_ray.rl.scheduler import RolloutScheduler, StepBatch


class MixedDataScheduler(RolloutScheduler):
    """A course whose lessons hold the rows that `sft` would learn from in the same step. They are
    read again from the start where they do not last for all steps; `shown` is the job as `sft`
    would see it."""

    def __init__(
        self,
        shown: Job,
        groups: Sequence[RowGroup],
        job: Job,
        path: str,
        first_step: int,
        first_problem: int,
    ) -> None:
        super().__init__(job, path, first_step, first_problem)
        self._negative_coefficient = shown.sft.negative_coefficient
        num_rows = sum(group.num_train for group in groups)
        self._tables = steps(
            groups,
            row_filter(shown),
            num_epochs=-(-job.rl.steps * shown.sft.examples_per_step // num_rows),
            rows_per_step=shown.sft.examples_per_step,
            rows_per_window=shown.sft.rows_per_window,
            seed=job.run.seed,
            first_step=first_step,
        )

    def _hand_over(self, groups: tuple[RolloutGroup, ...], dropped: tuple[str, ...]) -> StepBatch:
        batch = super()._hand_over(groups, dropped)
        rows = sequences_of(next(self._tables), self._negative_coefficient)
        return replace(batch, traces=tuple(rows))
