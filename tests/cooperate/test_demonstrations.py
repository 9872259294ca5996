"""The index finds the first row of a prompt, for any files and any fingerprint collisions."""

from __future__ import annotations

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.cooperate.schedulers import Demonstration, DemonstrationIndex
from pear_ray.data.scored_dataset import OPTIONAL_COLUMNS, scan_dataset
from tests.data.scored_rows import GOOD, WANTED, row, stored, table_of

PROMPTS = [[4], [4, 5], [5, 4], [4, 4], [5, 4, 4]]


def linear_search(rows, prompt_ids):
    for one in rows:
        is_train = one["split"] == "train" and one["correct"] is not False
        if is_train and one["prompt_ids"] == list(prompt_ids):
            trainable = one["trainable"]
            return Demonstration(
                tuple(one["response_ids"]),
                tuple(one["behavior_logprobs"]),
                None if trainable is None else tuple(trainable),
                one["source"],
            )
    return None


ROWS = st.fixed_dictionaries(
    {
        "prompt_ids": st.sampled_from(PROMPTS),
        "response_ids": st.tuples(*[st.integers(0, 99)] * 3).map(list),
        "split": st.sampled_from(["train", "train", "heldout"]),
        "correct": st.sampled_from([None, True, False]),
        "trainable": st.sampled_from([None, [True, False, True]]),
        "source": st.sampled_from(["teacher_cipher", "teacher_plain"]),
    }
)


@settings(max_examples=40)
@given(
    files=st.lists(st.lists(ROWS, min_size=1, max_size=8), min_size=1, max_size=3),
    rows_per_group=st.integers(1, 4),
    fingerprint=st.sampled_from([None, len, lambda ids: 2**64 - 1, lambda ids: int(ids[0])]),
)
def test_find_returns_the_first_row_with_the_prompt(tmp_path_factory, files, rows_per_group, fingerprint):
    rows = [[row(f"{n}-{m}", **one) for m, one in enumerate(file)] for n, file in enumerate(files)]
    folder = tmp_path_factory.mktemp("scored")
    groups = scan_dataset(stored(folder, *(table_of(*file) for file in rows), rows_per_group=rows_per_group), WANTED)
    index = DemonstrationIndex(groups, WANTED, *([] if fingerprint is None else [fingerprint]))
    all_rows = [one for file in rows for one in file]
    for prompt_ids in [*PROMPTS, [6]]:
        assert index.find(tuple(prompt_ids)) == linear_search(all_rows, prompt_ids)


def test_the_row_filter_applies(tmp_path):
    rows = [row("a", source="teacher_cipher", response_ids=[1, 2, 3]), row("b", source="teacher_plain")]
    groups = scan_dataset(stored(tmp_path, table_of(*rows)), WANTED)
    found = DemonstrationIndex(groups, replace(WANTED, sources=("teacher_plain",))).find((4, 5))
    assert found is not None and found.source == "teacher_plain"


def test_heldout_rows_are_not_found(tmp_path):
    groups = scan_dataset(stored(tmp_path, table_of(row("a", split="heldout"))), WANTED)
    assert DemonstrationIndex(groups, WANTED).find((4, 5)) is None


def test_optional_columns_may_be_missing(tmp_path):
    groups = scan_dataset(stored(tmp_path, GOOD.drop_columns(sorted(OPTIONAL_COLUMNS))), WANTED)
    assert DemonstrationIndex(groups, WANTED).find((4, 5)) == Demonstration(
        (7, 8, 1), (-0.5, -1.0, -0.25), None, "teacher_plain"
    )


def test_rows_are_read_on_demand_and_cached(tmp_path):
    tables = [table_of(row("a", prompt_ids=[number])) for number in range(10)]
    index = DemonstrationIndex(scan_dataset(stored(tmp_path, *tables), WANTED), WANTED)
    assert index.find((3,)) is not None
    for number in range(10):
        (tmp_path / f"{number}.parquet").unlink()
    assert index.find((3,)) is not None and index.find((77,)) is None
    with pytest.raises(FileNotFoundError):
        index.find((4,))
    pq.write_table(tables[4], tmp_path / "4.parquet")
    assert index.find((4,)) is not None
