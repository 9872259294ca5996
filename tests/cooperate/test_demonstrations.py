"""The first row with a prompt, whatever the files and however many rows share a fingerprint."""

from __future__ import annotations

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.cooperate.demonstrations import Demonstration, DemonstrationIndex
from pear_ray.data.scored_dataset import OPTIONAL, scan
from tests.data.scored_rows import GOOD, WANTED, row, stored, table_of

PROMPTS = [[4], [4, 5], [5, 4], [4, 4], [5, 4, 4]]


def slow_find(rows, prompt_ids):
    for one in rows:
        fits = one["split"] == "train" and one["correct"] is not False
        if fits and one["prompt_ids"] == list(prompt_ids):
            trainable = one["trainable"]
            return Demonstration(
                tuple(one["response_ids"]),
                tuple(one["behavior_logprobs"]),
                None if trainable is None else tuple(trainable),
                one["source"],
            )
    return None


a_row = st.fixed_dictionaries(
    {
        "prompt_ids": st.sampled_from(PROMPTS),
        "response_ids": st.tuples(*[st.integers(0, 99)] * 3).map(list),
        "split": st.sampled_from(["train", "train", "heldout"]),
        "correct": st.sampled_from([None, True, False]),
        "trainable": st.sampled_from([None, [True, False, True]]),
        "source": st.sampled_from(["coder", "tutor"]),
    }
)


@settings(max_examples=60)
@given(
    files=st.lists(st.lists(a_row, min_size=1, max_size=8), min_size=1, max_size=3),
    rows_per_group=st.integers(1, 4),
    fingerprint=st.sampled_from([None, len, lambda ids: 2**64 - 1, lambda ids: int(ids[0])]),
)
def test_the_first_row_with_the_prompt_is_found(
    tmp_path_factory, files, rows_per_group, fingerprint
):
    rows = [[row(f"{n}-{m}", **one) for m, one in enumerate(file)] for n, file in enumerate(files)]
    folder = tmp_path_factory.mktemp("scored")
    groups = scan(
        stored(folder, *(table_of(*file) for file in rows), rows_per_group=rows_per_group), WANTED
    )
    traces = DemonstrationIndex(groups, WANTED, *([] if fingerprint is None else [fingerprint]))
    together = [one for file in rows for one in file]
    for prompt_ids in [*PROMPTS, [6]]:
        assert traces.find(tuple(prompt_ids)) == slow_find(together, prompt_ids)


def test_only_rows_of_the_wanted_sources_are_found(tmp_path):
    rows = [row("a", source="coder", response_ids=[1, 2, 3]), row("b", source="tutor")]
    groups = scan(stored(tmp_path, table_of(*rows)), WANTED)
    found = DemonstrationIndex(groups, replace(WANTED, sources=("tutor",))).find((4, 5))
    assert found is not None and found.source == "tutor"


def test_a_corpus_without_training_rows_has_no_trace(tmp_path):
    groups = scan(stored(tmp_path, table_of(row("a", split="heldout"))), WANTED)
    assert DemonstrationIndex(groups, WANTED).find((4, 5)) is None


def test_columns_that_may_be_missing_are_not_needed(tmp_path):
    groups = scan(stored(tmp_path, GOOD.drop_columns(sorted(OPTIONAL))), WANTED)
    assert DemonstrationIndex(groups, WANTED).find((4, 5)) == Demonstration(
        (7, 8, 1), (-0.5, -1.0, -0.25), None, "tutor"
    )


def test_rows_are_read_when_they_are_asked_for(tmp_path):
    tables = [table_of(row("a", prompt_ids=[number])) for number in range(10)]
    traces = DemonstrationIndex(scan(stored(tmp_path, *tables), WANTED), WANTED)
    assert traces.find((3,)) is not None
    for number in range(10):
        (tmp_path / f"{number}.parquet").unlink()
    assert traces.find((3,)) is not None and traces.find((77,)) is None
    with pytest.raises(FileNotFoundError):
        traces.find((4,))
    pq.write_table(tables[4], tmp_path / "4.parquet")
    assert traces.find((4,)) is not None
