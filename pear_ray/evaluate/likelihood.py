"""What a checkpoint's engine says of answers that others wrote: of the corpus's held-out rows, and
of those of the checkpoint from which its training began."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_ray.engines.engine_pool import EnginePool
from pear_ray.engines.generator import ScoreRequest
from pear_ray.statistics import mean_with_interval


def heldout_rows(folder: Path) -> list[dict[str, Any]]:
    """Prompt and response ids of the held-out rows of the scored corpus, if there is one, and
    which of the latter are the assistant's."""
    rows = []
    for file in sorted(folder.glob("*.parquet")):
        wanted = {"prompt_ids", "response_ids", "trainable"} & set(pq.read_schema(file).names)
        heldout = [("split", "==", "heldout")]
        rows += pq.read_table(file, columns=sorted(wanted), filters=heldout).to_pylist()
    return rows


def heldout_nll(pool: EnginePool, rows: list[dict[str, Any]]) -> float | None:
    """Mean loss over the assistant's tokens of the held-out rows, in nats."""
    if not rows:
        return None
    scores = pool.generate(
        [ScoreRequest(tuple(r["prompt_ids"]), tuple(r["response_ids"])) for r in rows]
    )
    chosen = [score[row.get("trainable") or ...] for score, row in zip(scores, rows, strict=True)]
    return float(-np.concatenate(chosen).mean())


def kl_from(
    pool: EnginePool, prompts: Sequence[tuple[int, ...]], attempts: pa.Table, seed: int
) -> dict[str, float]:
    """KL(start || end) over whole answers to held-out prompts, in nats, with its 95 % interval over
    problems. The start wrote the `attempts`, each problem's first with its token ids and log-probs;
    the end is what the fleet serves: the mean of log p_start - log p_end is an unbiased estimate.

    `prompts` are token ids, in the order of the problems in `attempts`. The answers must have been
    sampled at temperature 1: from another, their log-probs are not those of the policy.
    """
    first = attempts.filter(pc.equal(attempts.column("sample"), 0)).to_pylist()
    traces = [
        ScoreRequest(prompt, tuple(row["response_ids"]))
        for prompt, row in zip(prompts, first, strict=True)
    ]
    ends = pool.generate(traces)
    gaps = [np.sum(row["logprobs"]) - end.sum() for row, end in zip(first, ends, strict=True)]
    return mean_with_interval(np.array(gaps), seed)
