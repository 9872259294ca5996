"""Write an offline corpus: each behavior policy answers training problems, right answers are
kept with the log-probs they were sampled with."""

from __future__ import annotations

import logging
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.config import Job
from pear_ray.data.tokenizer import encode_conversation, encode_prompts, load_tokenizer
from pear_ray.engines.engine_pool import EnginePool
from pear_ray.engines.generator import SampleRequest
from pear_ray.errors import ConfigError
from pear_ray.metrics import Tracker
from pear_ray.ray_cluster import connect
from pear_ray.records import EXAMPLE_SCHEMA, Completion, Problem
from pear_ray.rewards.pool import RewardPool
from pear_ray.run import RunDir
from pear_ray.seeds import seed_of
from pear_ray.tasks import endless_problems

if TYPE_CHECKING:
    from pear_ray.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Sample every source of the corpus into one Parquet file each."""
    settings = job.corpus.sample
    assert settings is not None
    connect()
    facts: dict[str, Any] = {}
    tracker = Tracker(run.folder, "sample", job.tracking).rewind(0)
    reward_pool = RewardPool(job.tasks, job.rewards)
    first = job.model_path(next(iter(settings.num_examples)))
    try:
        with (
            EnginePool.from_job(job, first, partial(run.event, "sample")) as pool,
            run.new_folder("sample") as folder,
        ):
            for number, (source, num_examples) in enumerate(settings.num_examples.items()):
                if number:
                    pool.load_folder(job.model_path(source))
                rows, num_attempts = sample_source(job, source, num_examples, pool, reward_pool)
                table = pa.Table.from_pylist(rows, EXAMPLE_SCHEMA)
                pq.write_table(table, folder / f"{source}.parquet")
                facts[source] = {"examples": len(rows), "attempts": num_attempts}
                tracker.log(number, source=source, examples=len(rows), attempts=num_attempts)
                log.info("sample: %s: %d right answers of %d", source, len(rows), num_attempts)
    finally:
        reward_pool.close()
        tracker.close()
    return facts


def sample_source(
    job: Job, source: str, num_examples: int, pool: EnginePool, reward_pool: RewardPool
) -> tuple[list[dict[str, Any]], int]:
    """Example rows of one source, and how many answers they took."""
    settings = job.corpus.sample
    assert settings is not None
    tokenizer = load_tokenizer(job.model_path(source))
    problems = endless_problems(job.tasks, "train", seed_of(job.run.seed, source))
    rows: list[dict[str, Any]] = []
    num_attempts = 0
    while len(rows) < num_examples:
        if num_attempts > settings.max_attempts_per_example * num_examples:
            raise ConfigError(
                f"corpus.sample.num_examples.{source}: read {num_examples};"
                f" {job.model_path(source)} gave only {len(rows)} right answers to {num_attempts}"
                " problems; expected a better model or fewer examples"
            )
        batch = list(islice(problems, 4 * job.generator.max_num_seqs * job.generator.num_engines))
        prompts = encode_prompts(tokenizer, [problem.messages for _, problem in batch])
        requests = [
            SampleRequest(
                prompt,
                num_samples=1,
                seed=seed_of(job.run.seed, "sample", source, problem.problem_id, epoch),
                temperature=settings.temperature,
            )
            for (epoch, problem), prompt in zip(batch, prompts, strict=True)
        ]
        answers = [answer for (answer,) in pool.generate(requests)]
        pairs = [(p, answer.text) for (_, p), answer in zip(batch, answers, strict=True)]
        rows += [
            example(source, epoch, problem, answer)
            for (epoch, problem), answer, grade in zip(
                batch, answers, reward_pool.grade(pairs), strict=True
            )
            if grade.correct and can_be_read_back(tokenizer, problem, answer)
        ]
        num_attempts += len(batch)
    return rows[:num_examples], num_attempts


def example(source: str, epoch: int, problem: Problem, answer: Completion) -> dict[str, Any]:
    """One row of the corpus."""
    return {
        "example_id": f"{source}-{problem.problem_id}-{epoch}",
        "messages": [*problem.messages, {"role": "assistant", "content": answer.text}],
        "source": source,
        "correct": True,
        "response_ids": answer.token_ids,
        "behavior_logprobs": answer.logprobs,
    }


def can_be_read_back(tokenizer: Tokenizer, problem: Problem, answer: Completion) -> bool:
    """Whether the answer's text has the very tokens that were sampled: a corpus is text, and
    log-probs of other tokens would be worth nothing."""
    if answer.finish_reason != "stop":
        return False
    messages = [*problem.messages, {"role": "assistant", "content": answer.text}]
    return encode_conversation(tokenizer, messages).response_ids == list(answer.token_ids)
