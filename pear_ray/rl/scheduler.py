"""The rollout scheduler: which prompts to sample now, and which groups each step trains on.

Problems form one stream with a fixed order. Each step consumes the next groups of it, so the position in the stream is
all that a run needs to resume: no problem is trained on twice and none is skipped, whichever process dies. With dynamic
sampling (DAPO, arXiv 2503.14476 section 3.2) a group whose advantages are all 0 is dropped and later groups move up.

A prompt is sampled with weights at most `rl.max_staleness` steps older than the step that trains on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from pear_ray.config import Job
from pear_ray.data.tokenizer import encode_prompts, load_tokenizer
from pear_ray.engines.generator import SampleRequest
from pear_ray.losses.policy import group_advantages
from pear_ray.records import Completion, Grade, Problem, RolloutGroup, TrainingSequence
from pear_ray.statistics import seed_of
from pear_ray.tasks import endless_problems

# Problems that one step may drop, per prompt it needs, before the run fails.
MAX_DROPPED_PER_PROMPT = 20


@dataclass
class PendingGroup:
    """A problem that no step has trained on yet; `group` is set once its completions are graded. A problem whose prompt
    leaves no room for a completion is dropped without being sampled."""

    problem: Problem
    request: SampleRequest
    completions: tuple[Completion, ...] = ()
    grades: tuple[Grade, ...] = ()
    group: RolloutGroup | None = None
    is_dropped: bool = False


@dataclass(frozen=True)
class StepBatch:
    """The groups that one step trains on.

    They and the `dropped` problem ids cover positions [first_problem, next_problem) of the stream. `demonstrations` are
    offline sequences that stage `cooperate` trains on in the same step.

        StepBatch(step=3, groups=(RolloutGroup("countdown-3-7-9-30", ...), ...), first_problem=12,
                  next_problem=17, dropped=("countdown-1-2-3-6",))
    """

    step: int
    groups: tuple[RolloutGroup, ...]
    first_problem: int
    next_problem: int
    dropped: tuple[str, ...]
    demonstrations: tuple[TrainingSequence, ...] = ()


class RolloutScheduler:
    """Assign the problems from `first_problem` on to the steps from `first_step` on."""

    def __init__(self, job: Job, path: str, first_step: int, first_problem: int) -> None:
        self._settings = job.rl
        self._seed = job.run.seed
        self._max_new_tokens = job.generator.max_new_tokens
        self._max_model_len = job.generator.max_model_len
        self._max_dropped = MAX_DROPPED_PER_PROMPT * job.rl.prompts_per_step + 1
        self._tokenizer = load_tokenizer(path)
        self._stream = islice(endless_problems(job.tasks, "train", seed_of(job.run.seed, "rl")), first_problem, None)
        self._step = first_step
        # By position in the stream, in its order.
        self._pending: dict[Hashable, PendingGroup] = {}
        self._num_ungraded = 0
        self._num_dropped = 0
        self._first_problem = first_problem
        self._next_problem = first_problem

    def next_requests(self, version: int) -> Sequence[tuple[Hashable, SampleRequest]]:
        """Return the requests to submit now, by key, if `version` is the newest weight version.

        On-policy runs repeat to the bit, so the requests that an engine batches together must not depend on which
        completion came first: dropped groups are replaced only after all groups are graded.
        """
        rl = self._settings
        if rl.max_staleness == 0 and self._num_ungraded:
            return []
        last_step = min(version + rl.max_staleness, rl.steps - 1)
        num_needed = (last_step + 1 - self._step) * rl.prompts_per_step
        slots = range(len(self._pending) - self._num_dropped, num_needed)
        due: list[tuple[Hashable, SampleRequest]] = []
        num_too_long = 0
        while len(due) < len(slots):
            free_slots = slots[len(due) :]
            requests = self._draw(free_slots)
            num_too_long = 0 if requests else num_too_long + len(free_slots)
            if num_too_long >= self._max_dropped:
                raise self._too_many_dropped()
            due += requests
        return due

    def _draw(self, slots: Sequence[int]) -> list[tuple[Hashable, SampleRequest]]:
        """Draw one problem per slot; those whose prompts fit fill the first slots. A slot is the rank of a group among
        those that the coming steps train on."""
        rl = self._settings
        drawn = [next(self._stream) for _ in slots]
        prompts = encode_prompts(self._tokenizer, [problem.messages for _, problem in drawn])
        requests: list[tuple[Hashable, SampleRequest]] = []
        for (epoch, problem), prompt in zip(drawn, prompts, strict=True):
            step = self._step + slots[len(requests)] // rl.prompts_per_step
            seed = seed_of(self._seed, "rl", problem.problem_id, epoch)
            request = SampleRequest(prompt, rl.group_size, seed, rl.temperature, max(0, step - rl.max_staleness))
            fits = len(prompt) < self._max_model_len
            self._pending[self._next_problem] = PendingGroup(problem, request, is_dropped=not fits)
            if fits:
                requests.append((self._next_problem, request))
            self._next_problem += 1
        self._num_ungraded += len(requests)
        self._num_dropped += len(drawn) - len(requests)
        return requests

    def take_prefilled(self) -> list[tuple[Hashable, list[tuple[Problem, str]]]]:
        """Return completions that need grades but no engine, by key, each once."""
        return []

    def prompt_ids(self, key: Hashable) -> tuple[int, ...]:
        """Return the prompt of the request with this key."""
        return self._pending[key].request.prompt_ids

    def add_completions(self, key: Hashable, completions: tuple[Completion, ...]) -> list[tuple[Problem, str]]:
        """Add the completions of a request; return (problem, text) pairs to grade."""
        pending = self._pending[key]
        pending.completions = completions
        return [(pending.problem, completion.text) for completion in completions]

    def add_rewards(self, key: Hashable, grades: Sequence[Grade]) -> None:
        """Add the grades of a request's completions, in their order."""
        pending = self._pending[key]
        pending.grades = tuple(grades)
        self._finish_group(pending)

    def _finish_group(self, pending: PendingGroup) -> None:
        """Compute the advantages of a problem whose completions are all graded."""
        rl, completions = self._settings, pending.completions
        rewards = [grade.reward for grade in pending.grades]
        if rl.overlong_buffer_tokens:
            limits = self._max_new_tokens, rl.overlong_buffer_tokens
            penalties = [soft_overlong_penalty(completion.num_tokens, *limits) for completion in completions]
            rewards = [reward + penalty for reward, penalty in zip(rewards, penalties, strict=True)]
        kind = "nft" if rl.loss.type == "nft" else rl.advantage
        advantages = tuple(group_advantages(torch.tensor(rewards), kind).tolist())
        problem_id, prompt_ids = pending.problem.problem_id, pending.request.prompt_ids
        pending.group = RolloutGroup(problem_id, prompt_ids, completions, pending.grades, advantages)
        pending.is_dropped = rl.dynamic_sampling and not any(advantages)
        self._num_ungraded -= 1
        self._num_dropped += pending.is_dropped

    def pop_batch(self) -> StepBatch | None:
        """Return the batch of the next step; None while a group of it is missing. Raise RuntimeError if the step
        dropped too many problems."""
        groups: list[RolloutGroup] = []
        dropped: list[str] = []
        for pending in self._pending.values():
            if pending.is_dropped:
                dropped.append(pending.problem.problem_id)
                if len(dropped) == self._max_dropped:
                    raise self._too_many_dropped()
                continue
            if pending.group is None:
                return None
            groups.append(pending.group)
            if len(groups) == self._settings.prompts_per_step:
                return self._build_batch(tuple(groups), tuple(dropped))
        return None

    def _build_batch(self, groups: tuple[RolloutGroup, ...], dropped: tuple[str, ...]) -> StepBatch:
        end = self._first_problem + len(groups) + len(dropped)
        batch = StepBatch(self._step, groups, self._first_problem, end, dropped)
        for position in range(self._first_problem, end):
            del self._pending[position]
        self._num_dropped -= len(dropped)
        self._first_problem = end
        self._step += 1
        return batch

    def _too_many_dropped(self) -> RuntimeError:
        return RuntimeError(
            f"step {self._step}: dropped {self._max_dropped} problems, because all completions earned the same reward"
            f" (rl.dynamic_sampling) or the prompt leaves no room in generator.max_model_len = {self._max_model_len};"
            " expected problems that fit and are sometimes solved"
        )


def soft_overlong_penalty(num_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """Return DAPO's soft overlong punishment of a completion (arXiv 2503.14476, eq. 13): 0 up to max_tokens -
    buffer_tokens, then falling linearly to -1 at max_tokens, where it stays."""
    return max(-1.0, min(0.0, (max_tokens - buffer_tokens - num_tokens) / buffer_tokens))


def batch_metrics(batch: StepBatch) -> dict[str, float]:
    """Return the rollout metrics of a step."""
    grades = [grade for group in batch.groups for grade in group.grades]
    completions = [completion for group in batch.groups for completion in group.completions]
    num_zero_std = sum(not any(group.advantages) for group in batch.groups) + len(batch.dropped)
    tokens_by_staleness: Counter[int] = Counter()
    for completion in completions:
        for version, num_tokens in completion.version_spans:
            tokens_by_staleness[batch.step - version] += num_tokens
    # All completions of a step may be demonstrations as a whole, with no token of the policy.
    num_tokens = max(1, sum(tokens_by_staleness.values()))
    metrics = {
        "reward_mean": float(np.mean([grade.reward for grade in grades])),
        "pass_rate": float(np.mean([grade.correct for grade in grades])),
        "frac_reward_zero_std": num_zero_std / (len(batch.groups) + len(batch.dropped)),
        "first_problem": batch.first_problem,
        "next_problem": batch.next_problem,
        "problems_dropped": len(batch.dropped),
        "completions_mean_length": float(np.mean([c.num_tokens for c in completions])),
        "completions_clipped_ratio": float(np.mean([c.finish_reason == "length" for c in completions])),
        "staleness_max": max(tokens_by_staleness, default=0),
        "staleness_mean": sum(staleness * n for staleness, n in tokens_by_staleness.items()) / num_tokens,
    }
    has_prefix = [bool(c.prefix_ids) for c in completions]
    return metrics | ({"prefix_frac": float(np.mean(has_prefix))} if any(has_prefix) else {})
