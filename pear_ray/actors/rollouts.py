"""The generators' side of the RL loop: problems in, judged groups of answers out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from pear_ray.actors.pool import GeneratorPool
from pear_ray.actors.verifiers import Verifier
from pear_ray.algorithms.advantages import group_advantages
from pear_ray.algorithms.seeds import seed_of
from pear_ray.config import Job
from pear_ray.engines.generator import Request
from pear_ray.engines.tokenizer import load_tokenizer, prompt_ids
from pear_ray.records import Completion, Problem, RolloutGroup, TrainingSequence
from pear_ray.tasks import endless_problems, make_tasks
from pear_ray.weights.manifest import WeightVersion

NUM_PROBES = 8


@dataclass(frozen=True)
class Rollouts:
    """Everything that generators hand over for one learner step.

    `probe` holds fixed answers with the log-probs that the serving engine gives them NOW (float32
    [response tokens]), so that the learner can check that both sides hold the same weights;
    `numbers` are the sampling side's metrics.
    """

    version: int
    groups: tuple[RolloutGroup, ...]
    probe: tuple[tuple[TrainingSequence, np.ndarray], ...]
    numbers: dict[str, float]


class RolloutStream:
    """Rollouts of one step after another. The position in the stream of problems IS the step, so
    none is used twice and none is skipped, wherever a run begins again."""

    def __init__(
        self, job: Job, path: str, first_step: int, pool: GeneratorPool, verifier: Verifier
    ) -> None:
        self._job = job
        self._pool = pool
        self._verifier = verifier
        self._tokenizer = load_tokenizer(path)
        self._problems = endless_problems(
            make_tasks(job.tasks), "train", seed_of(job.run.seed, "rl")
        )
        for _ in islice(self._problems, first_step * job.rl.problems_per_step):
            pass
        self._served = -1
        self._probe: tuple[TrainingSequence, ...] = ()

    def next(self, version: WeightVersion) -> Rollouts:
        """Answers to the next problems under `version`, with verdicts and advantages."""
        pause = 0.0
        if version.version != self._served:
            pause = self._pool.update(version, self._job.weights.deadline_seconds)
            self._served = version.version
        problems, requests = self._draw()
        started = time.perf_counter()
        answers = self._pool.sample(requests, self._job.rl.temperature)
        sampled = time.perf_counter()
        groups = self._judge(problems, requests, answers)
        judged = time.perf_counter()
        # One answer to each of the first problems stays the probe of the whole run.
        self._probe = self._probe or tuple(sequence_of(group, 0) for group in groups[:NUM_PROBES])
        ids = [(s.token_ids[~s.trainable], s.token_ids[s.trainable]) for s in self._probe]
        scores = self._pool.score([(p.tolist(), r.tolist()) for p, r in ids])
        numbers = rollout_numbers(groups) | {
            "pause_seconds": pause,
            "sample_seconds": sampled - started,
            "verdict_seconds": judged - sampled,
        }
        return Rollouts(self._served, groups, tuple(zip(self._probe, scores, strict=True)), numbers)

    def _draw(self) -> tuple[list[Problem], list[Request]]:
        settings, seed = self._job.rl, self._job.run.seed
        drawn = list(islice(self._problems, settings.problems_per_step))
        requests = [
            Request(
                tuple(prompt_ids(self._tokenizer, problem.messages)),
                settings.group_size,
                seed_of(seed, "rl", problem.problem_id, epoch),
            )
            for epoch, problem in drawn
        ]
        return [problem for _, problem in drawn], requests

    def _judge(
        self,
        problems: Sequence[Problem],
        requests: Sequence[Request],
        answers: Sequence[tuple[Completion, ...]],
    ) -> tuple[RolloutGroup, ...]:
        pairs = zip(problems, answers, strict=True)
        texts = [(problem, answer.text) for problem, group in pairs for answer in group]
        verdicts = iter(self._verifier.judge(texts))
        groups = []
        for problem, request, completions in zip(problems, requests, answers, strict=True):
            own = tuple(islice(verdicts, len(completions)))
            rewards_G = torch.tensor([verdict.reward for verdict in own])
            advantages = tuple(group_advantages(rewards_G, self._job.rl.advantage).tolist())
            groups.append(
                RolloutGroup(problem.problem_id, request.prompt_ids, completions, own, advantages)
            )
        return tuple(groups)


def sequence_of(group: RolloutGroup, member: int) -> TrainingSequence:
    """One answer of a group as tokens, with its advantage on each of them."""
    answer = group.completions[member]
    return TrainingSequence.of(
        group.prompt_ids,
        answer.token_ids,
        answer.logprobs,
        group.advantages[member],
        group.problem_id,
    )


def rollout_numbers(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """The sampling side's part of a line of metrics.jsonl."""
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    answers = [answer for group in groups for answer in group.completions]
    unanimous = [len({verdict.reward for verdict in group.verdicts}) == 1 for group in groups]
    return {
        "reward_mean": float(np.mean([verdict.reward for verdict in verdicts])),
        "pass_rate": float(np.mean([verdict.correct for verdict in verdicts])),
        "groups_without_signal_share": float(np.mean(unanimous)),
        "response_tokens_mean": float(np.mean([len(answer.token_ids) for answer in answers])),
        "truncated_share": float(np.mean([answer.finish_reason == "length" for answer in answers])),
    }
