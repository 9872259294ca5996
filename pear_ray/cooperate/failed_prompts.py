"""A course whose steps also learn from traces of the problems that the policy fails (MIFO, arXiv
2510.04454)."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np

from pear_ray.config import Job
from pear_ray.cooperate.demonstrations import DemonstrationIndex
from pear_ray.records import RolloutGroup, TrainingSequence
from pear_ray.rl.scheduler import RolloutScheduler, StepBatch


class FailedPromptScheduler(RolloutScheduler):
    """Problems and rollouts are those of `Course`. A lesson also has the trace of each problem, in
    their order, of whose answers at most `cooperate.failed_pass_rate` were right: of those that
    were passed over too, for where groups without signal are replaced a problem that is always
    failed is one of them."""

    def __init__(
        self, traces: DemonstrationIndex, job: Job, path: str, first_step: int, first_problem: int
    ) -> None:
        super().__init__(job, path, first_step, first_problem)
        assert job.cooperate is not None
        self._traces, self._failed_pass_rate = traces, job.cooperate.failed_pass_rate

    def _hand_over(self, groups: tuple[RolloutGroup, ...], dropped: tuple[str, ...]) -> StepBatch:
        judged = [asked.group for asked in islice(self._asked.values(), len(groups + dropped))]
        found = [self._trace_of(group) for group in judged if group and self._is_failed(group)]
        traces = tuple(trace for trace in found if trace is not None)
        return replace(super()._hand_over(groups, dropped), traces=traces)

    def _is_failed(self, group: RolloutGroup) -> bool:
        pass_rate = np.mean([grade.correct for grade in group.grades])
        return bool(pass_rate <= self._failed_pass_rate)

    def _trace_of(self, group: RolloutGroup) -> TrainingSequence | None:
        trace = self._traces.find(group.prompt_ids)
        if trace is None:
            return None
        return TrainingSequence.of(
            group.prompt_ids,
            trace.response_ids,
            trace.behavior_logprobs,
            1.0,
            trace.source,
            trace.trainable,
        )
