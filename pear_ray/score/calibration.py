"""Does the trainer's forward pass say of a probe what the engine says?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray


@ray.remote
def calibrate(
    folder: Path, model: str, dtype: str, tokens_per_pack: int, num_threads: int
) -> dict[str, Any]:
    """Differences of log-probs, trainer minus engine, over the response tokens of those rows in
    the folder's files which this model's engine scored, in nats.

    Returns:
        rows, tokens, bias (mean), spread (standard deviation), mean_gap and max_gap (absolute).
    """
    from pear_ray.train.model import trainer_logprobs

    table = pq.ParquetDataset(sorted(map(str, folder.glob("*.parquet")))).read()
    rows = table.filter(pc.equal(table.column("behavior_model"), model)).to_pylist()
    if not rows:
        return {"rows": 0, "tokens": 0}
    asked = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    found = trainer_logprobs(model, dtype, asked, tokens_per_pack, num_threads)
    differences = [
        (ours - np.asarray(row["behavior_logprobs"]))[row["trainable"] or ...]
        for ours, row in zip(found, rows, strict=True)
    ]
    gaps = np.concatenate(differences).astype(np.float64)
    return {
        "rows": len(rows),
        "tokens": len(gaps),
        "bias": float(gaps.mean()),
        "spread": float(gaps.std()),
        "mean_gap": float(np.abs(gaps).mean()),
        "max_gap": float(np.abs(gaps).max()),
    }
