"""The tokenized corpus in shards, which are scored, stored and resumed as a whole. The stage's work directory:

    tokenized/NAME.parquet              rows in the order of example_id, cut into row groups
    logprobs/NAME-GROUP-SCORER.parquet  one shard: the rows of one scorer in a row group; done if it exists
    scored/part-NUMBER.parquet  rejected/  probe/    both merged, file by file

Which rows an engine sees together does not depend on interruptions: the output is bit-identical after any crash.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_ray.data.tokenizer import fingerprint
from pear_ray.run import atomic_write
from pear_ray.statistics import seed_of

# Ray Data returns the results of a task together: one item per task, up to this many tasks.
MAX_TASKS = 4096
LEAKED = "split: expected 'heldout', as in other rows of this prompt, got 'train'"
FLOATS, IDS = pa.list_(pa.float32()), pa.list_(pa.int32())
LOGPROBS_SCHEMA = pa.schema({"row": pa.int32(), "logprobs": FLOATS, "top_ids": IDS, "top_logprobs": FLOATS})


@dataclass(frozen=True)
class Shard:
    """The usable rows of one scorer in one row group of a tokenized file. Example: Shard("3f0c", row_group=2,
    scorer="teacher_plain", num_rows=391, num_tokens=80122)."""

    file: str
    row_group: int
    scorer: str
    num_rows: int
    num_tokens: int


@dataclass(frozen=True)
class TokenizedFile:
    """One tokenized file, `tokenized/NAME.parquet`."""

    name: str
    first_id: str
    shards: tuple[Shard, ...]
    num_rows: int
    num_rejected: int
    has_given_splits: bool

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> TokenizedFile:
        """Return the file that `asdict` and JSON made a dict of."""
        return cls(**{**document, "shards": tuple(Shard(**shard) for shard in document["shards"])})


@dataclass(frozen=True)
class ScoringPlan:
    """Which rows are rejected, scored, and part of the probe. `probe_fractions` is the share of each scorer's rows in
    the probe; `leaked_prompts` are the contents (hashes) of held-out prompts that also occur in training rows."""

    probe_fractions: Mapping[str, float]
    leaked_prompts: frozenset[int]

    def reject_reasons(self, table: pa.Table) -> list[str]:
        """Return why each row is rejected, "" if it is not."""
        columns = (table.column(name).to_pylist() for name in ("reason", "split", "content"))
        return [
            LEAKED if not reason and split == "train" and content in self.leaked_prompts else reason
            for reason, split, content in zip(*columns, strict=True)
        ]

    def in_probe(self, table: pa.Table) -> np.ndarray:
        """Return which rows are in the probe, bool [rows]; the draw depends on example_id only."""
        limits = [self.probe_fractions.get(scorer, 0) * 2**31 for scorer in table.column("scorer").to_pylist()]
        draws = [seed_of("probe", example_id) for example_id in table.column("example_id").to_pylist()]
        return np.array(draws) < np.array(limits)

    def to_score(self, table: pa.Table) -> np.ndarray:
        """Return which rows an engine scores, bool [rows]: not recorded, or in the probe."""
        is_usable = np.array([not reason for reason in self.reject_reasons(table)], dtype=bool)
        has_none = table.column("recorded_logprobs").is_null().to_numpy(zero_copy_only=False)
        return is_usable & (has_none | self.in_probe(table))


def plan_scoring(folder: Path, files: Sequence[TokenizedFile], probe_rows: int) -> ScoringPlan:
    """Return a plan with about `probe_rows` rows per scorer in the probe."""
    totals: Counter[str] = Counter()
    for file in files:
        for shard in file.shards:
            totals[shard.scorer] += shard.num_rows
    fractions = {scorer: min(1.0, probe_rows / total) for scorer, total in totals.items()}
    # Drawn splits depend on the prompt alone; only given ones can leak.
    if not any(file.has_given_splits for file in files):
        return ScoringPlan(fractions, frozenset())

    def prompts(selected: pc.Expression) -> pa.Array:
        paths = [str(tokenized_path(folder, file.name)) for file in files]
        table = pq.ParquetDataset(paths, filters=selected).read(columns=["content"])
        return table.column("content").drop_null().unique()

    heldout = prompts(pc.field("split") == "heldout")
    leaked = prompts((pc.field("split") == "train") & pc.field("content").isin(heldout))
    return ScoringPlan(fractions, frozenset(leaked.to_pylist()))


def write_sorted(block: pa.Table, folder: Path, rows_per_shard: int) -> pa.Table:
    """Write a block of rows as a tokenized file and return it as one row, JSON in column `file`. No other block has
    rows with the same ids."""
    if not block.num_rows:
        return pa.table({"file": pa.array([], pa.string())})
    block = reject_repeats(block.combine_chunks())
    first_id = block.column("example_id")[0].as_py()
    name = fingerprint(first_id)
    with atomic_write(tokenized_path(folder, name)) as partial:
        pq.write_table(block, partial, row_group_size=rows_per_shard)
    shards = tuple(
        shard
        for group, start in enumerate(range(0, block.num_rows, rows_per_shard))
        for shard in cut_shards(block.slice(start, rows_per_shard), name, group)
    )
    num_rejected = block.num_rows - sum(shard.num_rows for shard in shards)
    has_given_splits = bool(pc.any(block.column("split_is_given")).as_py())
    file = TokenizedFile(name, first_id, shards, block.num_rows, num_rejected, has_given_splits)
    return pa.table({"file": [json.dumps(asdict(file))]})


def reject_repeats(block: pa.Table) -> pa.Table:
    """Sort rows by id and reject all but the first usable row (by digest) of each id."""
    is_rejected = pc.not_equal(block.column("reason"), "")
    keys = [("example_id", "ascending"), ("is_rejected", "ascending"), ("digest", "ascending")]
    order = pc.sort_indices(block.append_column("is_rejected", is_rejected), sort_keys=keys)
    block = block.take(order)
    ids, reasons = block.column("example_id").to_pylist(), block.column("reason").to_pylist()
    for row in range(1, len(ids)):
        if ids[row] == ids[row - 1] and not reasons[row]:
            reasons[row] = f"example_id: expected unique ids, got {ids[row]!r} more than once"
    position = block.schema.get_field_index("reason")
    return block.set_column(position, "reason", pa.array(reasons, pa.string()))


def cut_shards(rows: pa.Table, file: str, row_group: int) -> Iterator[Shard]:
    """Yield the shards of one row group, in the order of their scorers."""
    usable = rows.filter(pc.equal(rows.column("reason"), ""))
    table = pa.table({"scorer": usable.column("scorer"), "tokens": sequence_lengths(usable)})
    totals = table.group_by("scorer").aggregate([([], "count_all"), ("tokens", "sum")])
    for row in totals.sort_by("scorer").to_pylist():
        yield Shard(file, row_group, row["scorer"], row["count_all"], row["tokens_sum"])


def sequence_lengths(rows: pa.Table) -> pa.ChunkedArray:
    """Return the number of tokens of each row."""
    return pc.add(*(pc.list_value_length(rows.column(name)) for name in ("prompt_ids", "response_ids")))


def tokenization_rejects(folder: Path, files: Sequence[TokenizedFile]) -> Iterator[dict[str, str]]:
    """Yield example_id and reason of the rows that tokenization rejected."""
    for path in (tokenized_path(folder, file.name) for file in files if file.num_rejected):
        yield from pq.read_table(path, columns=["example_id", "reason"], filters=[("reason", "!=", "")]).to_pylist()


def tokenized_path(folder: Path, name: str) -> Path:
    """Return the path of a tokenized file."""
    return folder / "tokenized" / f"{name}.parquet"


def logprobs_path(folder: Path, file: str, row_group: int, scorer: str) -> Path:
    """Return the path of the log-probs of a shard; `scorer` may hold any characters."""
    return folder / "logprobs" / f"{file}-{row_group}-{fingerprint(scorer)}.parquet"


def write_logprobs(path: Path, rows: list[dict[str, Any]]) -> None:
    """Store a shard's log-probs atomically; the shard is done."""
    with atomic_write(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, LOGPROBS_SCHEMA), partial)
