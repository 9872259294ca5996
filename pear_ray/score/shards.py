"""The tokenized corpus on its way to scored rows, in parts that are scored and stored whole.

Below one folder, while the stage works:

    tokenized/NAME.parquet            rows in the order of example_id, one part per row group
    logprobs/NAME-GROUP-SCORER.parquet    what the model of one scorer says of them
    scored/part-NUMBER.parquet  rejected/  probe/    both put together, file by file

A part is done when its log-probs are there. Which rows an engine sees together depends on the
corpus alone, never on who was killed when: so what is written is the same to the bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_ray.run import atomic_write
from pear_ray.seeds import seed_of

LOGPROBS_SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("logprobs", pa.list_(pa.float32())),
        ("top_ids", pa.list_(pa.int32())),
        ("top_logprobs", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Shard:
    """The rows of one scorer in one row group of one tokenized file.

    Part("3f0c", row_group=2, scorer="tutor", num_rows=391, num_tokens=80122)
    """

    file: str
    row_group: int
    scorer: str
    num_rows: int
    num_tokens: int

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells it from all others."""
        return self.file, self.row_group, self.scorer


@dataclass(frozen=True)
class ScoringPlan:
    """Which rows are scored: all of `probes`' share of each scorer, and those of the others that
    bring no log-probs; none in training whose prompt (`overlapping`) is held out elsewhere."""

    probes: Mapping[str, float]
    overlapping: frozenset[int]

    def usable(self, table: pa.Table) -> np.ndarray:
        """Rows that training or evaluation may see, bool [rows]."""
        reasons = self.reasons(table)
        return np.array([not reason for reason in reasons], dtype=bool)

    def reasons(self, table: pa.Table) -> list[str]:
        """Why each row is no use, "" where it is of use."""
        reasons = table.column("reason").to_pylist()
        if self.overlapping:
            pairs = zip(
                table.column("split").to_pylist(), table.column("content").to_pylist(), strict=True
            )
            for number, (split, content) in enumerate(pairs):
                if not reasons[number] and split == "train" and content in self.overlapping:
                    reasons[number] = (
                        "split: read 'train'; expected 'heldout', as rows of this prompt are"
                    )
        return reasons

    def probed(self, table: pa.Table) -> np.ndarray:
        """Rows of the probe, bool [rows]: drawn by name, whatever else there is."""
        pairs = zip(
            table.column("example_id").to_pylist(), table.column("scorer").to_pylist(), strict=True
        )
        return np.array(
            [seed_of("probe", name) < self.probes.get(scorer, 0) * 2**31 for name, scorer in pairs],
            dtype=bool,
        )

    def scored(self, table: pa.Table) -> np.ndarray:
        """Rows for an engine, bool [rows]."""
        brings_none = table.column("recorded_logprobs").is_null().to_numpy(zero_copy_only=False)
        return self.usable(table) & (brings_none | self.probed(table))


def write_sorted(block: pa.Table, folder: Path, rows_per_part: int) -> pa.Table:
    """Write the rows of a block, no id of which is in another block, as a tokenized file.

    Of rows with one name the first usable one is kept, in the order of their content.

    Returns:
        One row, `facts`: JSON with the file's name, first id, parts, rejected rows, and whether
        any split was given.
    """
    if not block.num_rows:
        return pa.table({"facts": pa.array([], pa.string())})
    block = without_repeats(block.combine_chunks())
    first_id = block.column("example_id")[0].as_py()
    name = name_of(first_id)
    write_whole(folder / f"{name}.parquet", block, rows_per_part)
    parts = [
        asdict(part)
        for group, start in enumerate(range(0, block.num_rows, rows_per_part))
        for part in parts_of(block.slice(start, rows_per_part), name, group)
    ]
    facts = {
        "file": name,
        "first_id": first_id,
        "parts": parts,
        "num_rows": block.num_rows,
        "num_rejected": block.num_rows - sum(part["num_rows"] for part in parts),
        "splits_are_given": bool(pc.any(block.column("split_is_given")).as_py()),
    }
    return pa.table({"facts": [json.dumps(facts)]})


def without_repeats(block: pa.Table) -> pa.Table:
    """The block in the order of its ids, all but the first usable row of each with a reason."""
    is_unusable = pc.not_equal(block.column("reason"), "")
    keys = [("example_id", "ascending"), ("is_unusable", "ascending"), ("digest", "ascending")]
    order = pc.sort_indices(block.append_column("is_unusable", is_unusable), sort_keys=keys)
    block = block.take(order)
    ids, reasons = block.column("example_id").to_pylist(), block.column("reason").to_pylist()
    for number in range(1, len(ids)):
        if ids[number] == ids[number - 1] and not reasons[number]:
            reasons[number] = (
                f"example_id: read {ids[number]!r} more than once; expected a name of its own for"
                " each row"
            )
    place = block.schema.get_field_index("reason")
    return block.set_column(place, "reason", pa.array(reasons, pa.string()))


def parts_of(rows: pa.Table, file: str, row_group: int) -> Iterator[Shard]:
    """The parts of one row group."""
    usable = rows.filter(pc.equal(rows.column("reason"), ""))
    lengths = pc.add(
        pc.list_value_length(usable.column("prompt_ids")),
        pc.list_value_length(usable.column("response_ids")),
    )
    counted = pa.table({"scorer": usable.column("scorer"), "tokens": lengths})
    totals = counted.group_by("scorer").aggregate([([], "count_all"), ("tokens", "sum")])
    for row in totals.sort_by("scorer").to_pylist():
        yield Shard(file, row_group, row["scorer"], row["count_all"], row["tokens_sum"])


def logprobs_file(folder: Path, file: str, row_group: int, scorer: str) -> Path:
    """Where the log-probs of a part are, or will be."""
    return folder / "logprobs" / f"{file}-{row_group}-{name_of(scorer)}.parquet"


def write_logprobs(path: Path, rows: list[dict[str, Any]]) -> None:
    """Store a part's log-probs: from here on it is done."""
    write_whole(path, pa.Table.from_pylist(rows, LOGPROBS_SCHEMA), max(1, len(rows)))


def write_whole(path: Path, table: pa.Table, rows_per_group: int) -> None:
    """Write a Parquet file atomically."""
    with atomic_write(path) as partial:
        pq.write_table(table, partial, row_group_size=rows_per_group)


def arrays(column: pa.ChunkedArray) -> list[np.ndarray | None]:
    """A column of lists as one numpy array per row, None where there is none."""
    lists = column.combine_chunks()
    lists = lists if isinstance(lists, pa.ListArray) else pa.concat_arrays(lists.chunks)
    values, ends = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()
    is_there = lists.is_valid().to_numpy(zero_copy_only=False)
    return [
        values[start:end] if there else None
        for there, start, end in zip(is_there, ends[:-1], ends[1:], strict=True)
    ]


def name_of(text: str) -> str:
    """A file name for any text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
