"""Problems on their way to learner steps: which may be asked now, and which a step learns from.

The stream of problems has a fixed order. Step after step takes the next groups of it, so that a
position in the stream is all that a run needs to go on: none is learned from twice and none is
skipped, whoever dies. With dynamic sampling (DAPO, arXiv 2503.14476 section 3.2) groups without
signal are passed over, and later ones move up.

A problem is asked under weights so new that the latest step which may learn from it is at most
`rl.max_staleness` ahead of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from pear_ray.config import Job
from pear_ray.data.tokenizer import load_tokenizer, prompts_ids
from pear_ray.engines.generator import SampleRequest
from pear_ray.losses.advantages import group_advantages
from pear_ray.records import Completion, Grade, Problem, RolloutGroup, TrainingSequence
from pear_ray.rl.overlong import soft_punishment
from pear_ray.seeds import seed_of
from pear_ray.tasks import endless_problems

# Groups without signal in one step, for each that is wanted, before a run gives up.
MAX_DRAWS = 20


@dataclass
class PendingGroup:
    """A problem that was asked; `group` is there once its answers are judged. One whose prompt
    leaves no room for an answer is dropped and never asked."""

    problem: Problem
    request: SampleRequest
    completions: tuple[Completion, ...] = ()
    grades: tuple[Grade, ...] = ()
    group: RolloutGroup | None = None
    is_dropped: bool = False


@dataclass(frozen=True)
class StepBatch:
    """What one step learns from. `next_problem` is the position in the stream behind it;
    `dropped` are the ids of problems passed over on the way; `traces` are offline traces to learn
    from beside the rollouts."""

    step: int
    groups: tuple[RolloutGroup, ...]
    first_problem: int
    next_problem: int
    dropped: tuple[str, ...]
    traces: tuple[TrainingSequence, ...] = ()


class RolloutScheduler:
    """The way of all problems from `first_problem` on, to steps from `first_step` on."""

    def __init__(self, job: Job, path: str, first_step: int, first_problem: int) -> None:
        self._settings, self._seed = job.rl, job.run.seed
        self._max_new_tokens = job.generator.max_new_tokens
        self._max_model_len = job.generator.max_model_len
        self._tokenizer = load_tokenizer(path)
        stream = endless_problems(job.tasks, "train", seed_of(job.run.seed, "rl"))
        self._stream = islice(stream, first_problem, None)
        self._step = first_step
        # Problems that no step has taken, by their position in the stream.
        self._asked: dict[Hashable, PendingGroup] = {}
        # Of these, those without verdicts, and those that are passed over.
        self._num_open = self._num_dropped = 0
        self._first = self._next = first_problem

    def next_requests(self, version: int) -> Sequence[tuple[Hashable, SampleRequest]]:
        """What to ask now if `version` is the newest there is, by the keys under which answers are
        to come back.

        On-policy runs are repeatable to the bit: what an engine works on together must not depend
        on which answer came first. So they replace groups without signal only once all are judged.
        """
        return self._problems_due(version)

    def take_prefilled(self) -> list[tuple[Hashable, list[tuple[Problem, str]]]]:
        """Answers that no engine is asked for, to be judged, by key; each is told once."""
        return []

    def _problems_due(self, version: int) -> list[tuple[int, SampleRequest]]:
        rl = self._settings
        if rl.max_staleness == 0 and self._num_open:
            return []
        last_step = min(version + rl.max_staleness, rl.steps - 1)
        wanted = (last_step + 1 - self._step) * rl.prompts_per_step
        numbers = range(len(self._asked) - self._num_dropped, wanted)
        due: list[tuple[int, SampleRequest]] = []
        num_useless = 0
        while len(due) < len(numbers):
            left = numbers[len(due) :]
            asked = self._ask(left)
            num_useless = 0 if asked else num_useless + len(left)
            if num_useless >= self._most_useless:
                raise self._useless()
            due += asked
        return due

    def prompt_ids(self, position: Hashable) -> tuple[int, ...]:
        """What an engine was sent under this key."""
        return self._asked[position].request.prompt_ids

    def add_completions(
        self, position: Hashable, completions: tuple[Completion, ...]
    ) -> list[tuple[Problem, str]]:
        """Note the answers to a problem; returns what is to be judged."""
        asked = self._asked[position]
        asked.completions = completions
        return [(asked.problem, completion.text) for completion in completions]

    def add_rewards(self, position: Hashable, grades: Sequence[Grade]) -> None:
        """Note the verdicts on a problem's answers."""
        asked = self._asked[position]
        asked.grades = tuple(grades)
        self._close(asked)

    def _close(self, asked: PendingGroup) -> None:
        """Make a group of a problem's answers, all of which are judged."""
        rl = self._settings
        rewards = [grade.reward for grade in asked.grades]
        if rl.overlong_buffer_tokens:
            rewards = [
                reward
                + soft_punishment(
                    answer.num_tokens, self._max_new_tokens, rl.overlong_buffer_tokens
                )
                for reward, answer in zip(rewards, asked.completions, strict=True)
            ]
        kind = "nft" if rl.loss == "nft" else rl.advantage
        advantages = group_advantages(torch.tensor(rewards), kind).tolist()
        asked.group = RolloutGroup(
            asked.problem.problem_id,
            asked.request.prompt_ids,
            asked.completions,
            asked.grades,
            tuple(advantages),
        )
        asked.is_dropped = rl.dynamic_sampling and not any(advantages)
        self._num_open -= 1
        self._num_dropped += asked.is_dropped

    def pop_batch(self) -> StepBatch | None:
        """What the next step learns from, once it is there.

        Raises:
            RuntimeError: the tasks give next to no signal.
        """
        wanted, groups, dropped = self._settings.prompts_per_step, [], []
        for asked in self._asked.values():
            if asked.is_dropped:
                dropped.append(asked.problem.problem_id)
                if len(dropped) == self._most_useless:
                    raise self._useless()
                continue
            if asked.group is None:
                return None
            groups.append(asked.group)
            if len(groups) == wanted:
                return self._hand_over(tuple(groups), tuple(dropped))
        return None

    def _hand_over(self, groups: tuple[RolloutGroup, ...], dropped: tuple[str, ...]) -> StepBatch:
        end = self._first + len(groups) + len(dropped)
        batch = StepBatch(self._step, groups, self._first, end, dropped)
        for position in range(self._first, end):
            del self._asked[position]
        self._num_dropped -= len(dropped)
        self._first, self._step = end, self._step + 1
        return batch

    def _ask(self, numbers: Sequence[int]) -> list[tuple[int, SampleRequest]]:
        """Draw as many problems; those of them that can be asked are the next that steps may learn
        from, with the first of these numbers."""
        rl = self._settings
        drawn = [next(self._stream) for _ in numbers]
        prompts = prompts_ids(self._tokenizer, [problem.messages for _, problem in drawn])
        due: list[tuple[int, SampleRequest]] = []
        for (epoch, problem), prompt in zip(drawn, prompts, strict=True):
            latest_step = self._step + numbers[len(due)] // rl.prompts_per_step
            request = SampleRequest(
                prompt,
                rl.group_size,
                seed_of(self._seed, "rl", problem.problem_id, epoch),
                rl.temperature,
                max(0, latest_step - rl.max_staleness),
            )
            fits = len(prompt) < self._max_model_len
            self._asked[self._next] = PendingGroup(problem, request, is_dropped=not fits)
            if fits:
                due.append((self._next, request))
            self._next += 1
        self._num_open += len(due)
        self._num_dropped += len(drawn) - len(due)
        return due

    @property
    def _most_useless(self) -> int:
        return MAX_DRAWS * self._settings.prompts_per_step + 1

    def _useless(self) -> RuntimeError:
        return RuntimeError(
            f"step {self._step}: {self._most_useless} problems were of no use: their answers all"
            " earned the same (rl.dynamic_sampling), or their prompts leave no room in"
            f" generator.max_model_len {self._max_model_len}; expected problems that fit and are"
            " sometimes solved"
        )


def batch_metrics(batch: StepBatch) -> dict[str, float]:
    """The sampling side's part of a line of metrics.jsonl."""
    grades = [grade for group in batch.groups for grade in group.grades]
    answers = [answer for group in batch.groups for answer in group.completions]
    unanimous = sum(not any(group.advantages) for group in batch.groups) + len(batch.dropped)
    tokens_by_lag: Counter[int] = Counter()
    for answer in answers:
        for version, num_tokens in answer.version_spans:
            tokens_by_lag[batch.step - version] += num_tokens
    # A step may consist of whole traces, of which the policy wrote nothing.
    num_tokens = max(1, sum(tokens_by_lag.values()))
    numbers = {
        "reward_mean": float(np.mean([grade.reward for grade in grades])),
        "pass_rate": float(np.mean([grade.correct for grade in grades])),
        "frac_reward_zero_std": unanimous / (len(batch.groups) + len(batch.dropped)),
        "first_problem": batch.first_problem,
        "next_problem": batch.next_problem,
        "problems_dropped": len(batch.dropped),
        "completions_mean_length": float(np.mean([answer.num_tokens for answer in answers])),
        "completions_clipped_ratio": float(
            np.mean([answer.finish_reason == "length" for answer in answers])
        ),
        "staleness_max": max(tokens_by_lag, default=0),
        "staleness_mean": sum(lag * count for lag, count in tokens_by_lag.items()) / num_tokens,
    }
    is_guided = [bool(answer.trace_ids) for answer in answers]
    return numbers | ({"prefix_frac": float(np.mean(is_guided))} if any(is_guided) else {})
