"""TRAPO (arXiv 2512.17636): some completions begin with a prefix of a demonstration. The worse the completions of a
problem are so far, the longer the prefix."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil
from operator import itemgetter

import numpy as np

from pear_ray.config import Job, TrapoMethod
from pear_ray.cooperate.demonstrations import Demonstration, DemonstrationIndex
from pear_ray.cooperate.methods import CooperateStep, StepOutput, cooperate_settings
from pear_ray.data.tokenizer import decode_completion
from pear_ray.engines.generator import SampleRequest
from pear_ray.losses.mixed import JointTokenMean
from pear_ray.records import Completion, Grade, Problem
from pear_ray.rl.build import training_sequences
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.rl.scheduler import RolloutScheduler


class TrapoStep(CooperateStep):
    """One loss: SFT on the prefixes and RL on the continuations, the mean over all tokens."""

    def train(self, step: int, rollouts: RolloutBatch) -> StepOutput:
        sequences = training_sequences(self._job, rollouts.batch.groups)
        return self._train_on(sequences, JointTokenMean(self._rl_loss, self._sft_loss))


@dataclass(frozen=True, order=True)
class SampleChunk:
    """The completions, from number `first` on, that one request samples for the problem at `position`."""

    position: int
    first: int


@dataclass(frozen=True)
class MicroGroup:
    """`size` completions that begin with `prefix_frac` of a demonstration if the problem's mean reward so far is below
    `max_return`."""

    size: int
    prefix_frac: float
    max_return: float


class PrefixScheduler(RolloutScheduler):
    """A rollout scheduler that samples the micro-groups of a problem one after another.

    Leading micro-groups without a prefix are one request, and so are all completions of a problem without a
    demonstration: if no prefix is ever used, the requests are those of `RolloutScheduler`.

    The mean reward is that of the grades, 0 before the first. Advantages compare all completions of a problem. A prefix
    leaves room for one more token in generator.max_new_tokens and generator.max_model_len; but if the whole
    demonstration is due and fits, it is the completion and no engine samples. Of a multi-turn demonstration only the
    first answer is used.
    """

    def __init__(self, index: DemonstrationIndex, job: Job, path: str, first_step: int, first_problem: int) -> None:
        super().__init__(job, path, first_step, first_problem)
        method = cooperate_settings(job).method
        assert isinstance(method, TrapoMethod)
        self._index = index
        self._has_reference = job.rl.kl_coefficient > 0
        self._micro_groups = micro_groups_by_start(method)
        # Of the problems with completions to come, by position.
        self._demonstrations: dict[int, Demonstration] = {}
        self._queued: list[tuple[SampleChunk, SampleRequest]] = []
        # Submitted or prefilled, and not graded yet.
        self._in_flight: dict[Hashable, SampleRequest] = {}
        self._prefilled: list[tuple[Hashable, list[tuple[Problem, str]]]] = []

    def next_requests(self, version: int) -> Sequence[tuple[Hashable, SampleRequest]]:
        """As in `RolloutScheduler`. On-policy, the next micro-groups of all problems are submitted together, once none
        is in flight."""
        if self._settings.max_staleness == 0 and self._in_flight:
            return []
        for position, request in self._due_prompts(version):
            demonstration = self._index.find(request.prompt_ids)
            answer = None if demonstration is None else demonstration.first_answer()
            if answer is not None and answer.response_ids:
                self._demonstrations[position] = answer
            self._queue_next(position)
        # Grades arrive in any order, on which the engines' batches must not depend.
        requests, self._queued = sorted(self._queued, key=itemgetter(0)), []
        self._in_flight.update(requests)
        return requests

    def take_prefilled(self) -> list[tuple[Hashable, list[tuple[Problem, str]]]]:
        prefilled, self._prefilled = self._prefilled, []
        return prefilled

    def prompt_ids(self, key: Hashable) -> tuple[int, ...]:
        return self._in_flight[key].prompt_ids

    def add_completions(self, key: Hashable, completions: tuple[Completion, ...]) -> list[tuple[Problem, str]]:
        assert isinstance(key, SampleChunk)
        pending = self._pending[key.position]
        prefix_ids = self._in_flight[key].prompt_ids[len(pending.request.prompt_ids) :]
        if prefix_ids:
            logprobs = self._demonstrations[key.position].behavior_logprobs[: len(prefix_ids)]
            completions = tuple(
                replace(
                    completion,
                    text=decode_completion(self._tokenizer, prefix_ids + completion.token_ids),
                    prefix_ids=prefix_ids,
                    prefix_logprobs=logprobs,
                )
                for completion in completions
            )
        pending.completions += completions
        return [(pending.problem, completion.text) for completion in completions]

    def add_rewards(self, key: Hashable, grades: Sequence[Grade]) -> None:
        assert isinstance(key, SampleChunk)
        del self._in_flight[key]
        pending = self._pending[key.position]
        pending.grades += tuple(grades)
        if len(pending.grades) < self._settings.group_size:
            self._queue_next(key.position)
        else:
            self._demonstrations.pop(key.position, None)
            self._finish_group(pending)

    def _queue_next(self, position: int) -> None:
        """Queue or prefill the next chunk of a problem."""
        pending, demonstration = self._pending[position], self._demonstrations.get(position)
        chunk = SampleChunk(position, len(pending.completions))
        if demonstration is None:
            self._queued.append((chunk, pending.request))
            return
        group = self._micro_groups[chunk.first]
        rewards = [grade.reward for grade in pending.grades]
        num_prefix = 0
        if np.mean(rewards or [0.0]) < group.max_return:
            room = self._max_model_len - len(pending.request.prompt_ids)
            room = min(self._max_new_tokens, room)
            num_prefix = prefix_length(len(demonstration.response_ids), group.prefix_frac, room)
        request = replace(
            pending.request,
            prompt_ids=pending.request.prompt_ids + demonstration.response_ids[:num_prefix],
            num_samples=group.size,
            seed=pending.request.seed + chunk.first,
            max_new_tokens=self._max_new_tokens - num_prefix if num_prefix else None,
        )
        if num_prefix < len(demonstration.response_ids):
            self._queued.append((chunk, request))
        else:
            self._prefill(chunk, request)

    def _prefill(self, chunk: SampleChunk, request: SampleRequest) -> None:
        """Complete a chunk whose prefix is the whole demonstration."""
        self._in_flight[chunk] = request
        empty = Completion((), (), "", "stop", (), () if self._has_reference else None)
        pairs = self.add_completions(chunk, (empty,) * request.num_samples)
        self._prefilled.append((chunk, pairs))


def micro_groups_by_start(method: TrapoMethod) -> dict[int, MicroGroup]:
    """Return the micro-groups by the number of their first completion; leading ones without a prefix are merged into
    one."""
    sizes, fracs = method.prefix_groups, method.prefix_fracs
    starts = list(accumulate(sizes, initial=0))
    first = next((s for s, frac in zip(starts, fracs, strict=False) if frac > 0), starts[-1])
    groups = map(MicroGroup, sizes, fracs, method.prefix_returns)
    rest = {start: group for start, group in zip(starts, groups, strict=False) if start >= first}
    return {0: MicroGroup(first, 0.0, 0.0)} | rest if first else rest


def prefix_length(num_tokens: int, frac: float, room: int) -> int:
    """Return the length of a prefix of `num_tokens`: `frac` of them, rounded up, but at most `room` for all of them and
    `room` - 1 for fewer, which leaves the policy a token to sample."""
    length = ceil(frac * num_tokens)
    return length if length == num_tokens <= room else min(length, room - 1)
