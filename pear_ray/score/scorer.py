"""A Ray Data actor with a vLLM engine that scores shards of the tokenized corpus, and the progress of all of them."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from pear_ray.config import Job
from pear_ray.engines.generator import Generator, same_architecture
from pear_ray.metrics import Tracker
from pear_ray.run import RunDir
from pear_ray.score.shards import (
    MAX_TASKS,
    ScoringPlan,
    Shard,
    logprobs_path,
    sequence_lengths,
    tokenized_path,
    write_logprobs,
)

log = logging.getLogger(__name__)

TOKENS = ["prompt_ids", "response_ids", "trainable"]
COLUMNS = ["example_id", "scorer", "split", "content", "recorded_logprobs", "reason", *TOKENS]
MAX_ATTEMPTS = 20
SECONDS_PER_REPORT = 10.0


@dataclass(frozen=True)
class ShardResult:
    """A finished shard: rows and tokens scored (0 if it was stored before), and by which process. `shard_tokens` counts
    all its rows; `ended` is Unix time."""

    shard_tokens: int
    num_rows: int
    num_tokens: int
    ended: float
    actor: str
    process: str


def group_by_architecture(job: Job) -> list[dict[str, str]]:
    """Return the model of each source, grouped by architecture: an engine loads the weights of another model of the
    same architecture faster than a new engine starts."""
    groups: list[dict[str, str]] = []
    for source in sorted(job.behavior):
        path = job.model_path(source)
        for models in groups:
            if same_architecture(next(iter(models.values())), path):
                models[source] = path
                break
        else:
            groups.append({source: path})
    return groups


class Scorer:
    """Maps a `Shard` (as a dict) to a `ShardResult` and stores the shard's log-probs. One engine serves the models of
    several scorers in turn, so shards come sorted by scorer."""

    def __init__(self, job: Job, folder: Path, plan: ScoringPlan, models: dict[str, str]) -> None:
        self._folder = folder
        self._plan = plan
        self._models = models
        self._timeout_seconds = job.generator.timeout_seconds
        top_k = job.corpus.top_logprobs
        self._top_k = top_k
        self._version = 0
        self._model = next(iter(models.values()))
        self._generator = Generator(self._model, job.model.dtype, job.generator, job.run.seed, top_k, only_scores=True)
        self._actor = ray.get_runtime_context().get_actor_id()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score one shard, unless its log-probs are stored."""
        shard = Shard(**row)
        path = logprobs_path(self._folder, shard.file, shard.row_group, shard.scorer)
        # Ray retries the last shard of a dead actor, which may have stored it.
        num_rows = num_tokens = 0
        if not path.exists():
            self._count_attempt(path)
            table = self._read_rows(shard)
            num_rows, num_tokens = table.num_rows, self._score(table, shard.scorer, path)
            # Shards differ in size: return their fragments, which would add up.
            ctypes.CDLL(None).malloc_trim(0)
        process = f"{ray.util.get_node_ip_address()}:{os.getpid()}"
        return asdict(ShardResult(shard.num_tokens, num_rows, num_tokens, time.time(), self._actor, process))

    def _count_attempt(self, path: Path) -> None:
        """Count attempts in a file: a shard that killed this many engines kills the next one."""
        counter = path.with_suffix(".attempts")
        num_attempts = counter.stat().st_size if counter.exists() else 0
        if num_attempts == MAX_ATTEMPTS:
            raise RuntimeError(f"{path.name}: {num_attempts} engines died while scoring this shard")
        with counter.open("ab") as file:
            file.write(b"x")

    def _read_rows(self, shard: Shard) -> pa.Table:
        """Return the shard's rows to score; column `row` is their position in the row group."""
        file = pq.ParquetFile(tokenized_path(self._folder, shard.file))
        table = file.read_row_group(shard.row_group, columns=COLUMNS)
        scorers = np.array(table.column("scorer").to_pylist(), dtype=object)
        rows = np.flatnonzero(self._plan.to_score(table) & (scorers == shard.scorer))
        return table.take(pa.array(rows)).append_column("row", pa.array(rows, pa.int32()))

    def _score(self, table: pa.Table, scorer: str, path: Path) -> int:
        """Score and store rows; return the number of tokens that the engine processed."""
        model = self._models[scorer]
        if model != self._model:
            self._version += 1
            self._generator.load_folder(model, self._version)
            self._model = model
        lengths = sequence_lengths(table).to_numpy()
        # Rows of similar length share engine batches.
        table = table.take(pa.array(np.argsort(lengths, kind="stable")))
        rows = list(zip(*(table.column(name).to_pylist() for name in ("prompt_ids", "response_ids")), strict=True))
        # A hanging engine ends its process: Ray starts another, which retries the shard.
        faulthandler.dump_traceback_later(self._timeout_seconds, exit=True)
        try:
            scores = self._run_engine(rows)
        finally:
            faulthandler.cancel_dump_traceback_later()
        positions, masks = table.column("row").to_pylist(), table.column("trainable").to_numpy()
        scored = []
        for row, mask, (logprobs, ids, top) in zip(positions, masks, scores, strict=True):
            own = logprobs if mask is None else np.where(mask, logprobs, 0)
            scored.append({"row": row, "logprobs": own, "top_ids": ids, "top_logprobs": top})
        write_logprobs(path, scored)
        return int(lengths.sum())

    def _run_engine(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[Any, Any, Any]]:
        """Return log-probs, flat top-k ids and log-probs (or None) of each row."""
        if not self._top_k:
            return [(logprobs, None, None) for logprobs in self._generator.score(rows)]
        scores = self._generator.score_top(rows, self._top_k)
        return [(logprobs, ids.ravel(), top.ravel()) for logprobs, ids, top in scores]


def run_scorers(job: Job, folder: Path, plan: ScoringPlan, shards: list[Shard]) -> Iterator[ShardResult]:
    """Yield the results of vLLM actors that score the shards, one architecture after the other."""
    settings = job.generator
    for models in group_by_architecture(job):
        items = [asdict(shard) for shard in sorted(shards, key=lambda shard: shard.scorer) if shard.scorer in models]
        if not items:
            continue
        results = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_TASKS)).map(
            Scorer,
            fn_constructor_args=(job, folder, plan, models),
            compute=ray.data.ActorPoolStrategy(
                min_size=settings.min_engines,
                max_size=settings.num_engines,
                # Without it Ray 2.60 calls the engine from another thread than the constructor's, and on CPUs the
                # number of threads is kept per thread.
                enable_true_multi_threading=True,
                max_concurrent_calls_per_actor=1,
            ),
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_actor_gpus,
            label_selector=job.placement.generators,
        )
        for row in results.iter_rows():
            yield ShardResult(**row)


def log_progress(job: Job, run: RunDir, results: Iterable[ShardResult], shards: list[Shard], num_rejected: int) -> None:
    """Wait for the results of all shards; log rates, the time left and engine restarts."""
    tokens_in_all, last_report = sum(shard.num_tokens for shard in shards), 0.0
    done: list[ShardResult] = []
    processes: dict[str, str] = {}
    with closing(Tracker(run.folder, "score", job.tracking).rewind(0)) as tracker:
        for result in results:
            done.append(result)
            previous = processes.get(result.actor, result.process)
            if previous != result.process:
                run.event("score", "restarted", f"engine process {previous} died and was replaced by {result.process}")
            processes[result.actor] = result.process
            if time.monotonic() - last_report > SECONDS_PER_REPORT or len(done) == len(shards):
                last_report = time.monotonic()
                text, rates = f"score: {len(done)} of {len(shards)} shards", rates_since_first(done, tokens_in_all)
                if rates:
                    text += f", {rates['rows_per_second']:.0f} rows/s, {rates['tokens_per_second']:.0f} tokens/s"
                    text += f", {rates['seconds_left']:.0f} s left"
                tracker.log(len(done), parts=len(shards), rejected_rows=num_rejected, **rates)
                log.info(text, extra={"step": len(done)})


def rates_since_first(done: list[ShardResult], tokens_in_all: int) -> dict[str, float]:
    """Return the rates after the first shard, whose time includes the start of an engine, and the seconds left; empty
    if no shard was scored since. By the engines' clock: results reach the driver in bursts."""
    first, *others = done
    seconds = max(result.ended for result in done) - first.ended
    shard_tokens = sum(result.shard_tokens for result in others)
    if seconds <= 0 or not shard_tokens:
        return {}
    return {
        "rows_per_second": sum(result.num_rows for result in others) / seconds,
        "tokens_per_second": sum(result.num_tokens for result in others) / seconds,
        "seconds_left": (tokens_in_all - first.shard_tokens - shard_tokens) * seconds / shard_tokens,
    }
