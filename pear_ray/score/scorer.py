"""An actor that scores part after part of a tokenized corpus."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pear_ray.config import Generator as Settings
from pear_ray.engines.generator import Generator
from pear_ray.score.shards import ScoringPlan, arrays, logprobs_file, write_logprobs

COLUMNS = (
    "example_id", "scorer", "split", "content", "prompt_ids", "response_ids", "trainable",
    "recorded_logprobs", "reason",
)  # fmt: skip
MAX_ATTEMPTS = 20


class Scorer:
    """Maps {file, row_group, scorer} to what was done, and stores the part's log-probs.

    One engine serves the model of each scorer in turn: parts of one scorer should come together.
    """

    def __init__(
        self,
        folder: Path,
        models: dict[str, str],
        selection: ScoringPlan,
        dtype: str,
        settings: Settings,
        seed: int,
        num_top: int,
    ) -> None:
        self._folder = folder
        self._models = models
        self._selection = selection
        self._deadline_seconds = settings.timeout_seconds
        self._num_top = num_top
        self._num_served = 0
        self._served = next(iter(models.values()))
        self._generator = Generator(self._served, dtype, settings, seed, num_top, only_scores=True)
        self._actor = ray.get_runtime_context().get_actor_id()

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        path = logprobs_file(self._folder, part["file"], part["row_group"], part["scorer"])
        # Ray repeats the last part of an actor that died, perhaps after it was stored.
        num_rows = num_tokens = 0
        if not path.exists():
            self._attempt(path)
            table = self._rows(part)
            num_rows, num_tokens = table.num_rows, self._score(table, part["scorer"], path)
            # What parts of other sizes left in pieces would add up.
            ctypes.CDLL(None).malloc_trim(0)
        return {
            "part_tokens": part["num_tokens"],
            "num_rows": num_rows,
            "num_tokens": num_tokens,
            "ended": time.time(),
            "actor": self._actor,
            "process": f"{ray.util.get_node_ip_address()}:{os.getpid()}",
        }

    def _attempt(self, path: Path) -> None:
        """Leave a mark before each attempt: a part that ended so many engines ends the next."""
        marks = path.with_suffix(".attempts")
        num_attempts = marks.stat().st_size if marks.exists() else 0
        if num_attempts == MAX_ATTEMPTS:
            raise RuntimeError(f"{path.name}: {num_attempts} engines died over this part")
        with marks.open("ab") as file:
            file.write(b"x")

    def _rows(self, part: dict[str, Any]) -> pa.Table:
        """The part's rows that want a score, with their place in the row group as `row`."""
        file = pq.ParquetFile(self._folder / "tokenized" / f"{part['file']}.parquet")
        table = file.read_row_group(part["row_group"], columns=list(COLUMNS))
        scorers = np.array(table.column("scorer").to_pylist(), dtype=object)
        chosen = np.flatnonzero(self._selection.scored(table) & (scorers == part["scorer"]))
        return table.take(pa.array(chosen)).append_column("row", pa.array(chosen, pa.int32()))

    def _score(self, table: pa.Table, scorer: str, path: Path) -> int:
        """Score and store rows; returns the tokens that the engine read."""
        self._serve(self._models[scorer])
        ids = (table.column(name).to_pylist() for name in ("prompt_ids", "response_ids"))
        rows = list(zip(*ids, strict=True))
        lengths = [len(prompt) + len(response) for prompt, response in rows]
        # Rows near in length travel together.
        order = np.argsort(lengths, kind="stable")
        # An engine that hangs ends its process: Ray starts another, which repeats the part.
        faulthandler.dump_traceback_later(self._deadline_seconds, exit=True)
        try:
            found = self._ask([rows[i] for i in order])
        finally:
            faulthandler.cancel_dump_traceback_later()
        numbers, trainable = table.column("row").to_pylist(), arrays(table.column("trainable"))
        stored = []
        for i, (logprobs, top_ids, top_logprobs) in zip(order, found, strict=True):
            mask = trainable[i]
            stored.append(
                {
                    "row": numbers[i],
                    "logprobs": logprobs if mask is None else np.where(mask, logprobs, 0),
                    "top_ids": top_ids,
                    "top_logprobs": top_logprobs,
                }
            )
        write_logprobs(path, stored)
        return sum(lengths)

    def _ask(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[Any, Any, Any]]:
        """Log-probs, likeliest ids and their log-probs of each row, the last two flat or None."""
        if not self._num_top:
            return [(logprobs, None, None) for logprobs in self._generator.score(rows)]
        found = self._generator.score_top(rows, self._num_top)
        return [(logprobs, ids.ravel(), top.ravel()) for logprobs, ids, top in found]

    def _serve(self, model: str) -> None:
        if model != self._served:
            self._num_served += 1
            self._generator.load_folder(model, self._num_served)
            self._served = model
