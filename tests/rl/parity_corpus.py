"""A scored corpus of the parity task, for stages that train on demonstrations too."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.data.tokenizer import encode_prompt, load_tokenizer, tokenizer_digests
from pear_ray.records import SCORED_SCHEMA
from tests.rl.parity_task import Parity


def write_corpus(folder: Path, model: Path, max_rows: int | None = None) -> None:
    """Write correct responses to two of three problems, or to the first `max_rows` of these."""
    tokenizer, draw = load_tokenizer(str(model)), np.random.default_rng(0)
    tokenizer_digest, template_digest = tokenizer_digests(tokenizer)
    rows = []
    for number, problem in enumerate(islice(Parity().problems("train", 0), 9000)):
        if number % 3 == 0:
            continue
        words = " ".join(f"w{2 * n}" for n in draw.integers(0, 48, draw.integers(2, 6)))
        response = tokenizer(f"{words} {tokenizer.eos_token}")["input_ids"]
        rows.append(
            {
                "example_id": f"author-{problem.problem_id}",
                "prompt_ids": encode_prompt(tokenizer, problem.messages),
                "response_ids": response,
                "behavior_logprobs": (-3 * draw.random(len(response))).tolist(),
                "behavior_model": "author",
                "source": "author",
                "tokenizer_digest": tokenizer_digest,
                "template_digest": template_digest,
                "split": "train",
                "correct": True,
                "logprobs_from": "behavior",
            }
        )
    folder.mkdir()
    table = pa.Table.from_pylist(rows[:max_rows], SCORED_SCHEMA)
    pq.write_table(table, folder / "part-000000.parquet", row_group_size=200)
