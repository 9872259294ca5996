"""A course on which offline traces begin some answers and the policy goes on with them (TRAPO,
arXiv 2512.17636): the longer the beginnings, the worse a problem's answers are so far."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from operator import itemgetter

import numpy as np

from pear_ray.config import Cooperate, Job
from pear_ray.cooperate.demonstrations import Demonstration, DemonstrationIndex
from pear_ray.data.tokenizer import answer_text
from pear_ray.engines.generator import SampleRequest
from pear_ray.records import Completion, Grade, Problem
from pear_ray.rl.scheduler import PendingGroup, RolloutScheduler


@dataclass(frozen=True, order=True)
class SampleChunk:
    """Answers that are sampled together: those from number `first` on to the problem at
    `position`."""

    position: int
    first: int


@dataclass(frozen=True)
class MicroGroup:
    """`size` answers that begin with `share` of a trace, where the mean reward so far is below
    `prefix_return`."""

    size: int
    share: float
    prefix_return: float


class PrefixScheduler(RolloutScheduler):
    """The answers to a problem are sampled in the micro-groups of [cooperate], one after another.
    Those that lead and have no beginning are asked for together, and so are all answers to a
    problem without a trace: where nothing is ever shown, requests are those of `Course`.

    Whether a micro-group gets its beginning depends on the mean of the rewards that verdicts gave,
    0 before the first. Advantages compare all answers to a problem. A beginning leaves room in
    generator.max_new_tokens and generator.max_model_len for a token of the policy's own; but where
    the whole trace fits and is to be shown, it is the answer, and no engine is asked. Of a
    conversation with several answers only the first is shown.
    """

    def __init__(
        self, traces: DemonstrationIndex, job: Job, path: str, first_step: int, first_problem: int
    ) -> None:
        super().__init__(job, path, first_step, first_problem)
        assert job.cooperate is not None
        self._traces, self._has_reference = traces, job.rl.kl_coefficient > 0
        self._micro_groups = micro_groups_of(job.cooperate)
        # Traces of problems that have answers to come, by position.
        self._shown: dict[int, Demonstration] = {}
        # Parts without verdicts, with what was asked; those among them that no engine answers; and
        # parts that have yet to be asked.
        self._under_way: dict[Hashable, SampleRequest] = {}
        self._given: list[tuple[Hashable, list[tuple[Problem, str]]]] = []
        self._waiting: list[tuple[SampleChunk, SampleRequest]] = []

    def next_requests(self, version: int) -> Sequence[tuple[Hashable, SampleRequest]]:
        """As for `Course`: on-policy, the next micro-groups of all problems are asked together,
        once none is under way."""
        if self._settings.max_staleness == 0 and self._under_way:
            return []
        for position, request in self._problems_due(version):
            trace = self._traces.find(request.prompt_ids)
            if trace is not None and (first_answer := first_answer_of(trace)).response_ids:
                self._shown[position] = first_answer
            self._go_on(position)
        # Verdicts come in any order, and engines must not see it.
        work, self._waiting = sorted(self._waiting, key=itemgetter(0)), []
        self._under_way.update(work)
        return work

    def take_prefilled(self) -> list[tuple[Hashable, list[tuple[Problem, str]]]]:
        given, self._given = self._given, []
        return given

    def prompt_ids(self, key: Hashable) -> tuple[int, ...]:
        return self._under_way[key].prompt_ids

    def add_completions(
        self, key: Hashable, completions: tuple[Completion, ...]
    ) -> list[tuple[Problem, str]]:
        assert isinstance(key, SampleChunk)
        asked, request = self._asked[key.position], self._under_way[key]
        num_shown = len(request.prompt_ids) - len(asked.request.prompt_ids)
        if num_shown:
            trace = self._shown[key.position]
            completions = tuple(self._begun(trace, num_shown, one) for one in completions)
        asked.completions += completions
        return [(asked.problem, completion.text) for completion in completions]

    def add_rewards(self, key: Hashable, grades: Sequence[Grade]) -> None:
        assert isinstance(key, SampleChunk)
        del self._under_way[key]
        asked = self._asked[key.position]
        asked.grades += tuple(grades)
        if len(asked.grades) < self._settings.group_size:
            self._go_on(key.position)
        else:
            self._shown.pop(key.position, None)
            self._close(asked)

    def _go_on(self, position: int) -> None:
        """Make the next part of a problem, which waits for an engine or is given."""
        asked, trace = self._asked[position], self._shown.get(position)
        part = SampleChunk(position, len(asked.completions))
        if trace is None:
            self._waiting.append((part, asked.request))
            return
        group = self._micro_groups[part.first]
        num_shown = self._num_shown(asked, trace, group)
        request = replace(
            asked.request,
            prompt_ids=asked.request.prompt_ids + trace.response_ids[:num_shown],
            num_samples=group.size,
            seed=asked.request.seed + part.first,
            max_new_tokens=self._max_new_tokens - num_shown if num_shown else None,
        )
        if num_shown < len(trace.response_ids):
            self._waiting.append((part, request))
        else:
            self._give(part, request)

    def _num_shown(self, asked: PendingGroup, trace: Demonstration, group: MicroGroup) -> int:
        """Tokens of the trace that the next answers begin with."""
        rewards = [grade.reward for grade in asked.grades]
        if np.mean(rewards or [0.0]) >= group.prefix_return:
            return 0
        room = min(self._max_new_tokens, self._max_model_len - len(asked.request.prompt_ids))
        return beginning(len(trace.response_ids), group.share, room)

    def _give(self, part: SampleChunk, request: SampleRequest) -> None:
        """Take answers to which the policy has nothing to add."""
        self._under_way[part] = request
        nothing = Completion((), (), "", "stop", (), () if self._has_reference else None)
        self._given.append((part, self.add_completions(part, (nothing,) * request.num_samples)))

    def _begun(self, trace: Demonstration, num_shown: int, completion: Completion) -> Completion:
        """An answer with its beginning."""
        shown = trace.response_ids[:num_shown]
        return replace(
            completion,
            text=answer_text(self._tokenizer, shown + completion.token_ids),
            trace_ids=shown,
            trace_logprobs=trace.behavior_logprobs[:num_shown],
        )


def micro_groups_of(settings: Cooperate) -> dict[int, MicroGroup]:
    """By the number of the first answer; those that lead and have no beginning are one."""
    sizes, shares = settings.prefix_groups, settings.prefix_fracs
    first = next((sum(sizes[:n]) for n, share in enumerate(shares) if share > 0), sum(sizes))
    found = {0: MicroGroup(first, 0.0, 0.0)} if first else {}
    for number, group in enumerate(map(MicroGroup, sizes, shares, settings.prefix_returns)):
        if (start := sum(sizes[:number])) >= first:
            found[start] = group
    return found


def first_answer_of(trace: Demonstration) -> Demonstration:
    """The trace up to the first token that is not trainable: what follows is not the assistant's to
    write. Nothing where that is the first."""
    if trace.trainable is None or all(trace.trainable):
        return trace
    end = trace.trainable.index(False)
    return Demonstration(
        trace.response_ids[:end], trace.behavior_logprobs[:end], None, trace.source
    )


def beginning(num_tokens: int, share: float, room: int) -> int:
    """How many tokens of a trace of `num_tokens` are shown: `share` of them, rounded up. All of
    them must leave `room` tokens or fewer; some of them one less, for the policy goes on."""
    wanted = ceil(share * num_tokens)
    return wanted if wanted == num_tokens <= room else min(wanted, room - 1)
