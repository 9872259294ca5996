"""Schedulers, which choose the demonstrations of a step: offline traces of the scored corpus, found by their prompt."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate, islice
from math import ceil
from operator import itemgetter

import numpy as np
import xxhash

from pear_ray.config import Job, TrapoMethod
from pear_ray.cooperate.steps import cooperate_settings
from pear_ray.data.scored_dataset import NUM_READERS, RowFilter, RowGroup, batches, list_lengths, read_row_group
from pear_ray.data.scored_dataset import training_sequences as sequences_of_rows
from pear_ray.data.tokenizer import decode_completion
from pear_ray.engines.generator import SampleRequest
from pear_ray.records import Completion, Grade, Problem, RolloutGroup, TrainingSequence
from pear_ray.rl.scheduler import RolloutScheduler, StepBatch

# Row groups that stay in memory after a row of them was read.
NUM_CACHED = 4
# `RowFilter` needs split, correct and source.
INDEXED = ("prompt_ids", "split", "correct", "source")
READ = (*INDEXED, "response_ids", "behavior_logprobs", "trainable")


@dataclass(frozen=True)
class Demonstration:
    """A row of the scored corpus without its prompt: the log-prob (nats) of each response token under its author's
    policy, and which tokens are the assistant's (None: all).

        Demonstration((11, 43, 1), (-0.7, -1.2, -0.01), None, "teacher_plain")
    """

    response_ids: tuple[int, ...]
    behavior_logprobs: tuple[float, ...]
    trainable: tuple[bool, ...] | None
    source: str

    def first_answer(self) -> Demonstration:
        """Return the part before the first token that is not the assistant's."""
        if self.trainable is None or all(self.trainable):
            return self
        end = self.trainable.index(False)
        return Demonstration(self.response_ids[:end], self.behavior_logprobs[:end], None, self.source)


class DemonstrationIndex:
    """Index of the training rows of `groups` by prompt. Of rows with the same prompt the first counts, in the order of
    groups and rows.

    It takes 16 bytes of memory per row; rows are read on demand. `fingerprint` maps prompt ids (int32) to a number
    below 2^64, the same in every process; a collision costs one more read.
    """

    def __init__(
        self,
        groups: Sequence[RowGroup],
        row_filter: RowFilter,
        fingerprint: Callable[[np.ndarray], int] = lambda ids: xxhash.xxh3_64_intdigest(ids.data),
    ) -> None:
        self._fingerprint = fingerprint
        self._groups = [group for group in groups if group.num_train]
        read = partial(read_row_group, row_filter=row_filter, split="train")
        self._read = lru_cache(NUM_CACHED)(partial(read, columns=READ))
        self._read_indexed = partial(read, columns=INDEXED)
        with ThreadPoolExecutor(NUM_READERS) as pool:
            by_group = list(pool.map(self._fingerprint_rows, self._groups))
        by_row = np.concatenate([np.empty(0, np.uint64), *by_group])
        # Row numbers run through all groups. A stable sort puts the first of equal rows first.
        self._rows = np.argsort(by_row, kind="stable")
        self._fingerprints = by_row[self._rows]
        self._group_ends = np.cumsum([len(rows) for rows in by_group])

    def find(self, prompt_ids: tuple[int, ...]) -> Demonstration | None:
        """Return the demonstration of a prompt, None if there is none."""
        fingerprint = np.uint64(self._fingerprint(np.asarray(prompt_ids, np.int32)))
        start = np.searchsorted(self._fingerprints, fingerprint, side="left")
        end = np.searchsorted(self._fingerprints, fingerprint, side="right")
        for number in self._rows[start:end].tolist():
            group = int(np.searchsorted(self._group_ends, number, side="right"))
            table = self._read(self._groups[group])
            offset = number - int(self._group_ends[group]) + table.num_rows
            (row,) = table.slice(offset, 1).to_pylist()
            # Another prompt may have the same fingerprint.
            if tuple(row["prompt_ids"]) == prompt_ids:
                ids, logprobs, trainable = row["response_ids"], row["behavior_logprobs"], row["trainable"]
                trainable = None if trainable is None else tuple(trainable)
                return Demonstration(tuple(ids), tuple(logprobs), trainable, row["source"])
        return None

    def _fingerprint_rows(self, group: RowGroup) -> np.ndarray:
        prompts = self._read_indexed(group).column("prompt_ids")
        ids = prompts.combine_chunks().flatten().to_numpy()
        ends = np.cumsum(list_lengths(prompts))
        return np.array([self._fingerprint(one) for one in np.split(ids, ends)[:-1]], np.uint64)


class MixedDataScheduler(RolloutScheduler):
    """A rollout scheduler whose batches also have the corpus rows that `sft` would train on in the same step, over and
    over if there are fewer than all steps need."""

    def __init__(
        self, sft_job: Job, groups: list[RowGroup], job: Job, path: str, first_step: int, first_problem: int
    ) -> None:
        super().__init__(job, path, first_step, first_problem)
        sft = sft_job.sft
        self._negative_coefficient = sft.negative_coefficient
        num_rows = sum(group.num_train for group in groups)
        self._tables = batches(
            groups,
            RowFilter.from_job(sft_job),
            num_epochs=-(-job.rl.steps * sft.examples_per_step // num_rows),
            rows_per_step=sft.examples_per_step,
            rows_per_window=sft.rows_per_window,
            seed=job.run.seed,
            first_step=first_step,
        )

    def _build_batch(self, groups: tuple[RolloutGroup, ...], dropped: tuple[str, ...]) -> StepBatch:
        rows = sequences_of_rows(next(self._tables), self._negative_coefficient)
        return replace(super()._build_batch(groups, dropped), demonstrations=tuple(rows))


class FailedPromptScheduler(RolloutScheduler):
    """A rollout scheduler whose batches also have the demonstrations of failed prompts, in their order: prompts with at
    most `cooperate.failed_pass_rate` correct completions. Dropped ones count: under dynamic sampling a prompt that
    always fails is dropped."""

    def __init__(self, index: DemonstrationIndex, job: Job, path: str, first_step: int, first_problem: int) -> None:
        super().__init__(job, path, first_step, first_problem)
        self._index = index
        self._failed_pass_rate = cooperate_settings(job).failed_pass_rate

    def _build_batch(self, groups: tuple[RolloutGroup, ...], dropped: tuple[str, ...]) -> StepBatch:
        demonstrations = []
        for pending in islice(self._pending.values(), len(groups + dropped)):
            group, is_correct = pending.group, [grade.correct for grade in pending.grades]
            if group is None or float(np.mean(is_correct)) > self._failed_pass_rate:
                continue
            if (found := self._index.find(group.prompt_ids)) is not None:
                row = found.response_ids, found.behavior_logprobs, 1.0, found.source, found.trainable
                demonstrations.append(TrainingSequence.of(group.prompt_ids, *row))
        return replace(super()._build_batch(groups, dropped), demonstrations=tuple(demonstrations))


@dataclass(frozen=True, order=True)
class SampleChunk:
    """The completions, from number `first` on, that one request samples for the problem at `position`."""

    position: int
    first: int


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
        for position, request in super().next_requests(version):
            assert isinstance(position, int)
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
            texts = [decode_completion(self._tokenizer, prefix_ids + c.token_ids) for c in completions]
            completions = tuple(
                replace(completion, text=text, prefix_ids=prefix_ids, prefix_logprobs=logprobs)
                for completion, text in zip(completions, texts, strict=True)
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
        size, frac, max_return = self._micro_groups[chunk.first]
        rewards = [grade.reward for grade in pending.grades]
        num_prefix = 0
        if np.mean(rewards or [0.0]) < max_return:
            room = min(self._max_new_tokens, self._max_model_len - len(pending.request.prompt_ids))
            num_prefix = prefix_length(len(demonstration.response_ids), frac, room)
        request = replace(
            pending.request,
            prompt_ids=pending.request.prompt_ids + demonstration.response_ids[:num_prefix],
            num_samples=size,
            seed=pending.request.seed + chunk.first,
            max_new_tokens=self._max_new_tokens - num_prefix if num_prefix else None,
        )
        if num_prefix < len(demonstration.response_ids):
            self._queued.append((chunk, request))
            return
        # The prefix is the whole demonstration.
        self._in_flight[chunk] = request
        empty = Completion((), (), "", "stop", (), () if self._has_reference else None)
        self._prefilled.append((chunk, self.add_completions(chunk, (empty,) * request.num_samples)))


def micro_groups_by_start(method: TrapoMethod) -> dict[int, tuple[int, float, float]]:
    """Return (size, prefix_frac, max_return) of the micro-groups by the number of their first completion: `size`
    completions begin with `prefix_frac` of a demonstration if the problem's mean reward so far is below `max_return`.
    Leading ones without a prefix are merged into one."""
    sizes, fracs = method.prefix_groups, method.prefix_fracs
    starts = list(accumulate(sizes, initial=0))
    first = next((s for s, frac in zip(starts, fracs, strict=False) if frac > 0), starts[-1])
    groups = zip(sizes, fracs, method.prefix_returns, strict=True)
    rest = {start: group for start, group in zip(starts, groups, strict=False) if start >= first}
    return {0: (first, 0.0, 0.0)} | rest if first else rest


def prefix_length(num_tokens: int, frac: float, room: int) -> int:
    """Return the length of a prefix of `num_tokens`: `frac` of them, rounded up, but at most `room` for all of them and
    `room` - 1 for fewer, which leaves the policy a token to sample."""
    length = ceil(frac * num_tokens)
    return length if length == num_tokens <= room else min(length, room - 1)
