"""A scored dataset of a few rows, for the tests of its readers."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.data.scored_dataset import RowFilter
from pear_ray.records import SCORED_SCHEMA

WANTED = RowFilter(
    digests=("vocabulary", "template"), vocab_size=100, max_tokens=8, negatives=False, top_logprobs=False
)


def row(example_id, **changes):
    good = {
        "example_id": example_id,
        "prompt_ids": [4, 5],
        "response_ids": [7, 8, 1],
        "behavior_logprobs": [-0.5, -1.0, -0.25],
        "behavior_model": "models/teacher_plain",
        "source": "teacher_plain",
        "tokenizer_digest": "vocabulary",
        "template_digest": "template",
        "split": "train",
        "correct": None,
        "recorded_gap": None,
        "trainable": None,
        "truncated": False,
        "logprobs_from": "behavior",
        "top_ids": [7, 9, 8, 3, 1, 2],
        "top_logprobs": [-0.5, -1.0, -1.0, -2.0, -0.25, -3.0],
    }
    return good | changes


def of_length(num_prompt, num_response):
    """Changes to a row that give it these numbers of tokens, with one likeliest token each."""
    ids, logprobs = [7] * num_response, [-1.0] * num_response
    return {
        "prompt_ids": [4] * num_prompt,
        **dict.fromkeys(("response_ids", "top_ids"), ids),
        **dict.fromkeys(("behavior_logprobs", "top_logprobs"), logprobs),
    }


def table_of(*rows):
    return pa.Table.from_pylist(rows, SCORED_SCHEMA)


GOOD = table_of(row("a"), row("b"), row("c", split="heldout"))


def stored(folder, *tables, rows_per_group=2):
    """Write each table to NUMBER.parquet; return the folder."""
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=rows_per_group)
    return folder
