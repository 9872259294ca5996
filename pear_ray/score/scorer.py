"""A Ray Data actor with a vLLM engine that scores shards of the tokenized corpus."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pear_ray.config import Generator as Settings
from pear_ray.config import Job
from pear_ray.engines.generator import Generator, same_architecture
from pear_ray.score.shards import ScoringPlan, Shard, tokenized_path, write_logprobs

COLUMNS = [
    "example_id", "scorer", "split", "content", "prompt_ids", "response_ids", "trainable",
    "recorded_logprobs", "reason",
]  # fmt: skip
MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class ShardResult:
    """A finished shard: rows and tokens scored (0 if it was stored before), and by which process.

    `shard_tokens` counts all its rows; `ended` is Unix time.
    """

    shard_tokens: int
    num_rows: int
    num_tokens: int
    ended: float
    actor: str
    process: str


def group_by_architecture(job: Job) -> list[dict[str, str]]:
    """Return the model of each source, grouped by architecture.

    An engine loads the weights of another model of the same architecture faster than a new engine starts.
    """
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
    """Maps a `Shard` (as a dict) to a `ShardResult` and stores the shard's log-probs.

    One engine serves the models of several scorers in turn, so shards come sorted by scorer.
    """

    def __init__(
        self,
        folder: Path,
        models: dict[str, str],
        plan: ScoringPlan,
        dtype: str,
        settings: Settings,
        seed: int,
        top_k: int,
    ) -> None:
        self._folder = folder
        self._models = models
        self._plan = plan
        self._timeout_seconds = settings.timeout_seconds
        self._top_k = top_k
        self._version = 0
        self._model = next(iter(models.values()))
        self._generator = Generator(self._model, dtype, settings, seed, top_k, only_scores=True)
        self._actor = ray.get_runtime_context().get_actor_id()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score one shard, unless its log-probs are stored."""
        shard = Shard(**row)
        path = shard.logprobs_path(self._folder)
        # Ray retries the last shard of a dead actor, which may have stored it.
        num_rows = num_tokens = 0
        if not path.exists():
            self._count_attempt(path)
            table = self._read_rows(shard)
            num_rows, num_tokens = table.num_rows, self._score(table, shard.scorer, path)
            # Shards differ in size: return their fragments, which would add up.
            ctypes.CDLL(None).malloc_trim(0)
        process = f"{ray.util.get_node_ip_address()}:{os.getpid()}"
        result = ShardResult(shard.num_tokens, num_rows, num_tokens, time.time(), self._actor, process)
        return asdict(result)

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
        self._load(self._models[scorer])
        ids = (table.column(name).to_pylist() for name in ("prompt_ids", "response_ids"))
        rows = list(zip(*ids, strict=True))
        lengths = [len(prompt) + len(response) for prompt, response in rows]
        # Rows of similar length share engine batches.
        order = np.argsort(lengths, kind="stable")
        # A hanging engine ends its process: Ray starts another, which retries the shard.
        faulthandler.dump_traceback_later(self._timeout_seconds, exit=True)
        try:
            scores = self._run_engine([rows[i] for i in order])
        finally:
            faulthandler.cancel_dump_traceback_later()
        positions, trainable = table.column("row").to_pylist(), table.column("trainable").to_numpy()
        scored = []
        for i, (logprobs, top_ids, top_logprobs) in zip(order, scores, strict=True):
            mask = trainable[i]
            scored.append(
                {
                    "row": positions[i],
                    "logprobs": logprobs if mask is None else np.where(mask, logprobs, 0),
                    "top_ids": top_ids,
                    "top_logprobs": top_logprobs,
                }
            )
        write_logprobs(path, scored)
        return sum(lengths)

    def _run_engine(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[Any, Any, Any]]:
        """Return log-probs, flat top-k ids and log-probs (or None) of each row."""
        if not self._top_k:
            return [(logprobs, None, None) for logprobs in self._generator.score(rows)]
        scores = self._generator.score_top(rows, self._top_k)
        return [(logprobs, ids.ravel(), top.ravel()) for logprobs, ids, top in scores]

    def _load(self, model: str) -> None:
        if model != self._model:
            self._version += 1
            self._generator.load_folder(model, self._version)
            self._model = model
