"""A course driven by hand, with pretended engines and judges, and traces of its first problems."""

from __future__ import annotations

import random
from itertools import islice

from pear_ray.config import Job
from pear_ray.cooperate.demonstrations import DemonstrationIndex
from pear_ray.data.scored_dataset import RowFilter, scan
from pear_ray.data.tokenizer import load_tokenizer, prompt_ids
from pear_ray.records import Completion, Grade
from pear_ray.seeds import seed_of
from pear_ray.tasks import endless_problems
from tests.data.scored_rows import row, stored, table_of

PROBLEMS, STEPS, GROUP, NEW_TOKENS, MODEL_LEN = 3, 4, 4, 8, 14
WANTED = RowFilter(("vocabulary", "template"), 100, 64, negatives=False, top_logprobs=False)


def stream_of(job):
    return endless_problems(job.tasks, "train", seed_of(job.run.seed, "rl"))


def job_of(model, cooperate, **rl):
    return Job(
        run={"dir": "unused", "seed": 5},
        model={"path": model, "dtype": "float32"},
        rl={"steps": STEPS, "prompts_per_step": PROBLEMS, "group_size": GROUP, **rl},
        generator={"max_new_tokens": NEW_TOKENS, "max_model_len": MODEL_LEN},
        learner={"tokens_per_micro_batch": 64},
        tasks=[{"name": "countdown", "options": {"max_number": 4}}],
        cooperate=cooperate,
    )


def sampled(prompt, seed, limit):
    """What an engine makes of a prompt and a seed."""
    draw = random.Random(f"{prompt} {seed}")
    ids = tuple(draw.randint(3, 90) for _ in range(draw.randint(1, limit)))
    reason = "length" if len(ids) == limit else "stop"
    return Completion(ids, (-1.0,) * len(ids), f"{ids}", reason, ((0, len(ids)),))


def reward_of(text):
    """Rewards of every size, so that all thresholds matter."""
    return random.Random(text).choice([0.0, 0.0, 0.25, 0.5, 1.0])


def verdicts_on(pairs):
    return [Grade(reward_of(text), reward_of(text) == 1) for _, text in pairs]


def limit_of(request):
    return min(request.max_new_tokens or NEW_TOKENS, MODEL_LEN - len(request.prompt_ids))


def answers_to(request):
    return tuple(
        sampled(request.prompt_ids, request.seed + n, limit_of(request))
        for n in range(request.num_samples)
    )


def run(scheduler, draw, steps=STEPS):
    """All lessons of a run in which answers and verdicts come in any order, and the requests of
    each time that any were due."""
    version, lessons, asked = 0, [], []
    waiting, unjudged = [], []
    while len(lessons) < steps:
        if work := scheduler.next_requests(version):
            asked.append([request for _, request in work])
            waiting += work
        unjudged += scheduler.take_prefilled()
        draw.shuffle(waiting)
        for _ in range(draw.randint(0, len(waiting))):
            key, request = waiting.pop()
            assert scheduler.prompt_ids(key) == request.prompt_ids
            unjudged.append((key, scheduler.add_completions(key, answers_to(request))))
        draw.shuffle(unjudged)
        for _ in range(draw.randint(0, len(unjudged))):
            key, pairs = unjudged.pop()
            scheduler.add_rewards(key, verdicts_on(pairs))
        while (batch := scheduler.pop_batch()) is not None:
            lessons.append(batch)
            version += 1
    return lessons, asked


def traces_of(model, folder):
    """Traces for the first problems and none of the rest, of 2 to 10 tokens."""
    job = job_of(model, {"method": "sum"})
    tokenizer, rows = load_tokenizer(model), {}
    for number, (_, problem) in enumerate(islice(stream_of(job), 9)):
        ids = tuple(prompt_ids(tokenizer, problem.messages))
        response = [10 + number] * (number + 1) + [1]
        changes = {
            "prompt_ids": ids,
            "response_ids": response,
            "behavior_logprobs": [-0.5 * (n + 1) for n in range(len(response))],
            "trainable": [n != 3 for n in range(len(response))] if number == 4 else None,
        }
        rows.setdefault(ids, row(f"{number}", **changes))
    return DemonstrationIndex(scan(stored(folder, table_of(*rows.values())), WANTED), WANTED)
