"""Stage `sample`: write an offline corpus. Each behavior policy samples completions of training problems; correct ones
are kept, with the log-probs they were sampled with."""

from __future__ import annotations

import logging
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.config import Job
from pear_ray.data.tokenizer import encode_conversation, encode_prompts, load_tokenizer
from pear_ray.engines.engine_pool import EnginePool
from pear_ray.engines.generator import SampleRequest
from pear_ray.errors import ConfigError
from pear_ray.metrics import Tracker
from pear_ray.records import EXAMPLE_SCHEMA
from pear_ray.rewards.pool import RewardPool
from pear_ray.run import RunDir, atomic_folder, connect
from pear_ray.statistics import seed_of
from pear_ray.tasks import endless_problems

log = logging.getLogger(__name__)


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Sample every source of the corpus into one Parquet file each; return counts by source."""
    assert job.corpus.sample is not None
    connect()
    facts: dict[str, Any] = {}
    sources = list(job.corpus.sample.num_examples)
    log_event = partial(run.event, "sample")
    with (
        closing(Tracker(run.folder, "sample", job.tracking).rewind(0)) as tracker,
        RewardPool(job.tasks, job.rewards) as reward_pool,
        EnginePool(job, job.model_path(sources[0]), log_event) as pool,
        atomic_folder(run.folder / "sample") as folder,
    ):
        for number, source in enumerate(sources):
            if number:
                pool.load_folder(job.model_path(source))
            rows, num_attempts = sample_source(job, source, pool, reward_pool)
            pq.write_table(pa.Table.from_pylist(rows, EXAMPLE_SCHEMA), folder / f"{source}.parquet")
            facts[source] = {"examples": len(rows), "attempts": num_attempts}
            tracker.log(number, source=source, **facts[source])
            log.info("sample: %s: %d correct of %d completions", source, len(rows), num_attempts)
    return facts


def sample_source(job: Job, source: str, pool: EnginePool, reward_pool: RewardPool) -> tuple[list[dict[str, Any]], int]:
    """Return the example rows of one source and the number of completions they took; raise ConfigError if too few are
    correct."""
    settings, path = job.corpus.sample, job.model_path(source)
    assert settings is not None
    num_examples = settings.num_examples[source]
    tokenizer = load_tokenizer(path)
    problems = endless_problems(job.tasks, "train", seed_of(job.run.seed, source))
    rows: list[dict[str, Any]] = []
    num_attempts = 0
    while len(rows) < num_examples:
        if num_attempts > settings.max_attempts_per_example * num_examples:
            raise ConfigError(
                f"corpus.sample.num_examples.{source}: expected {num_examples} correct completions from {path}, got"
                f" {len(rows)} for {num_attempts} problems: use a better model or fewer examples"
            )
        drawn = list(islice(problems, 4 * job.generator.max_num_seqs * job.generator.num_engines))
        prompts = encode_prompts(tokenizer, [problem.messages for _, problem in drawn])
        seeds = [seed_of(job.run.seed, "sample", source, p.problem_id, epoch) for epoch, p in drawn]
        requests = [
            SampleRequest(prompt, num_samples=1, seed=seed, temperature=settings.temperature)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        completions = [completion for (completion,) in pool.generate(requests)]
        grades = reward_pool.grade([(p, c.text) for (_, p), c in zip(drawn, completions, strict=True)])
        for (epoch, problem), completion, grade in zip(drawn, completions, grades, strict=True):
            if not grade.correct or completion.finish_reason != "stop":
                continue
            messages = [*problem.messages, {"role": "assistant", "content": completion.text}]
            # A corpus is text: if it is tokenized into other ids than the sampled ones, the log-probs would be wrong.
            if encode_conversation(tokenizer, messages).response_ids == list(completion.token_ids):
                row = {
                    "example_id": f"{source}-{problem.problem_id}-{epoch}",
                    "messages": messages,
                    "source": source,
                    "correct": True,
                    "response_ids": completion.token_ids,
                    "behavior_logprobs": completion.logprobs,
                }
                rows.append(row)
        num_attempts += len(drawn)
    return rows[:num_examples], num_attempts
