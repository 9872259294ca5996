"""A scheduler driven with simulated engines and rewards."""

from __future__ import annotations

import random

from pear_ray.config import Job
from pear_ray.records import Completion, Grade
from pear_ray.statistics import seed_of
from pear_ray.tasks import endless_problems

PROMPTS, STEPS, GROUP, NEW_TOKENS, MODEL_LEN = 3, 4, 4, 8, 14


def make_job(model, cooperate=None, **rl):
    return Job(
        run={"dir": "unused", "seed": 5},
        model={"path": model, "dtype": "float32"},
        rl={"steps": STEPS, "prompts_per_step": PROMPTS, "group_size": GROUP, **rl},
        generator={"max_new_tokens": NEW_TOKENS, "max_model_len": MODEL_LEN},
        learner={"tokens_per_micro_batch": 64},
        tasks=[{"name": "countdown", "options": {"max_number": 4}}],
        cooperate=cooperate or {},
    )


def problem_stream(job):
    return endless_problems(job.tasks, "train", seed_of(job.run.seed, "rl"))


def simulate_completion(prompt, seed, max_new_tokens):
    """A completion that depends on prompt and seed alone, as an engine's does."""
    draw = random.Random(f"{prompt} {seed}")
    ids = tuple(draw.randint(3, 90) for _ in range(draw.randint(1, max_new_tokens)))
    reason = "length" if len(ids) == max_new_tokens else "stop"
    return Completion(ids, (-1.0,) * len(ids), f"{ids}", reason, ((0, len(ids)),))


def complete(request):
    limit = min(request.max_new_tokens or NEW_TOKENS, MODEL_LEN - len(request.prompt_ids))
    return tuple(simulate_completion(request.prompt_ids, request.seed + n, limit) for n in range(request.num_samples))


def reward_of(text):
    """A reward of any size, so that each threshold matters."""
    return random.Random(text).choice([0.0, 0.0, 0.25, 0.5, 1.0])


def grade(pairs):
    return [Grade(reward_of(text), reward_of(text) == 1) for _, text in pairs]


def run_scheduler(scheduler, draw):
    """All batches of a run whose completions and grades arrive in random order, and the requests that were due
    together."""
    version, batches, submitted = 0, [], []
    in_flight, ungraded = [], []
    while len(batches) < STEPS:
        if requests := scheduler.next_requests(version):
            submitted.append([request for _, request in requests])
            in_flight += requests
        ungraded += scheduler.take_prefilled()
        draw.shuffle(in_flight)
        for _ in range(draw.randint(0, len(in_flight))):
            key, request = in_flight.pop()
            assert scheduler.prompt_ids(key) == request.prompt_ids
            ungraded.append((key, scheduler.add_completions(key, complete(request))))
        draw.shuffle(ungraded)
        for _ in range(draw.randint(0, len(ungraded))):
            key, pairs = ungraded.pop()
            scheduler.add_rewards(key, grade(pairs))
        while (batch := scheduler.pop_batch()) is not None:
            batches.append(batch)
            version += 1
    return batches, submitted
