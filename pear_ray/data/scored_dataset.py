"""A scored corpus as `sft` reads it: looked through once, refused where it is no use, and read row
group by row group."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_ray.config import Job
from pear_ray.errors import ConfigError
from pear_ray.records import SCORED_SCHEMA, TrainingSequence
from pear_ray.run import check_layout

NUM_READERS = 8
OPTIONAL_COLUMNS = {
    "recorded_gap",
    "trainable",
    "truncated",
    "logprobs_from",
    "top_ids",
    "top_logprobs",
}
LISTS = ("prompt_ids", "response_ids", "behavior_logprobs")
TEACHER = ("top_ids", "top_logprobs")


@dataclass(frozen=True)
class RowFilter:
    """What a row must fit, and which rows are meant.

    `digests` are those of tokenizer and template, `max_tokens` of the longest sequence,
    `negatives` says whether traces that are known to be wrong are wanted too, `top_logprobs`
    whether the behavior policy's likeliest tokens are, `sources` whose rows are (none named: all).
    """

    digests: tuple[str, str]
    vocab_size: int
    max_tokens: int
    negatives: bool
    top_logprobs: bool
    sources: tuple[str, ...] = ()

    def mask(self, table: pa.Table, split: str) -> np.ndarray:
        """Which rows belong to `split`, bool [rows]. A trace that is known to be wrong is nothing
        to imitate, and nothing to measure imitation by."""
        of_split = pc.equal(table.column("split"), split)
        if not (self.negatives and split == "train"):
            right = pc.fill_null(table.column("correct"), True)
            of_split = pc.and_(of_split, right)
        if self.sources:
            theirs = pc.is_in(table.column("source"), pa.array(self.sources))
            of_split = pc.and_(of_split, theirs)
        return of_split.to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class RowGroup:
    """Where rows are, how many of each split are wanted, and who wrote them."""

    file: str
    number: int
    num_train: int
    num_heldout: int
    sources: tuple[str, ...]


def row_filter(job: Job) -> RowFilter:
    """What rows must be like to be trained on."""
    # Those who read rows for the learners need no tokenizer, and start sooner without.
    from pear_ray.data.tokenizer import load_tokenizer, num_embeddings, tokenizer_digests

    path = job.model_path()
    return RowFilter(
        digests=tokenizer_digests(load_tokenizer(path)),
        vocab_size=num_embeddings(path),
        max_tokens=job.learner.tokens_per_pack,
        negatives=job.sft.negatives,
        top_logprobs=job.sft.objective == "kl",
        sources=job.sft.sources,
    )


def scan_dataset(folder: Path, wanted: RowFilter) -> list[RowGroup]:
    """Look through all rows, in the order of files.

    Raises:
        ConfigError: file, field, what was read and what was expected, of the first mistake.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise ConfigError(f"{folder}: holds no .parquet file; expected what stage `score` writes")
    facts = folder / "facts.json"
    if facts.exists():
        check_layout(facts, json.loads(facts.read_text()), "score")
    counted = (likeliest_per_token(file) for file in files if wanted.top_logprobs)
    num_top = next((number for number in counted if number), 0)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        found = pool.map(lambda file: list(scan_file(file, wanted, num_top)), files)
        groups = [group for groups in found for group in groups]
    authors = sorted({source for group in groups for source in group.sources})
    if unknown := sorted(set(wanted.sources) - set(authors)):
        raise ConfigError(
            f"sft.sources: read {unknown}; expected among {authors}, those of {folder}"
        )
    return groups


def check_enough_rows(job: Job, groups: list[RowGroup]) -> None:
    """Raises ConfigError where a step's rows are more than there are."""
    num_rows = sum(group.num_train for group in groups)
    if num_rows < job.sft.examples_per_step:
        raise ConfigError(
            f"sft.examples_per_step: read {job.sft.examples_per_step}; {job.scored_folder}"
            f" holds {num_rows} training rows; expected at most as many"
        )


def likeliest_per_token(path: Path) -> int:
    """How many likeliest tokens the first row of a file has for each of its own; all rows must
    have as many. 0 where it cannot be told, which is refused when the file is looked through."""
    try:
        first = conform(pq.ParquetFile(path).read_row_group(0)).slice(0, 1)
    except (pa.ArrowException, OSError, IndexError):
        return 0
    num_top, num_response = (
        list_lengths(first.column(name)) for name in ("top_ids", "response_ids")
    )
    return int(num_top[0] // num_response[0]) if num_response.any() else 0


def scan_file(path: Path, wanted: RowFilter, num_top: int) -> Iterator[RowGroup]:
    """The row groups of one file, after checking them."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path}: {error}; expected a Parquet file of stage `score`") from error
    for field in SCORED_SCHEMA:
        if field.name in file.schema_arrow.names:
            read = file.schema_arrow.field(field.name).type
            if not (read.equals(field.type) or pa.types.is_null(read)):
                raise ConfigError(f"{path}: {field.name}: read type {read}; expected {field.type}")
        elif field.name not in OPTIONAL_COLUMNS or (wanted.top_logprobs and field.name in TEACHER):
            raise ConfigError(f"{path}: {field.name}: no such column; expected it of stage `score`")
    for number in range(file.num_row_groups):
        try:
            table = conform(file.read_row_group(number))
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{path}: {error}; expected pages that can be read") from error
        check(path, table, wanted, num_top)
        num_train, num_heldout = (int(wanted.mask(table, s).sum()) for s in ("train", "heldout"))
        sources = tuple(sorted(set(table.column("source").to_pylist())))
        yield RowGroup(str(path), number, num_train, num_heldout, sources)


def conform(table: pa.Table) -> pa.Table:
    """The columns of a scored corpus, all of them: null where there are none."""
    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in SCORED_SCHEMA
    ]
    return pa.table(columns, schema=SCORED_SCHEMA)


def check(path: Path, table: pa.Table, wanted: RowFilter, num_top: int) -> None:
    """Refuse rows that cannot be trained on."""

    def refuse(field: str, bad: np.ndarray, read: np.ndarray, expected: str) -> None:
        if bad.any():
            row = int(bad.argmax())
            name = table.column("example_id")[row].as_py()
            raise ConfigError(f"{path}: {name!r}: {field}: read {read[row]}; expected {expected}")

    for field, ours in zip(("tokenizer_digest", "template_digest"), wanted.digests, strict=True):
        theirs = np.array(table.column(field).to_pylist(), dtype=object)
        refuse(field, theirs != ours, theirs, f"{ours}, that of the model to be trained")
    splits = np.array(table.column("split").to_pylist(), dtype=object)
    refuse("split", ~np.isin(splits, ["train", "heldout"]), splits, "'train' or 'heldout'")
    sources = np.array(table.column("source").to_pylist(), dtype=object)
    nobody = np.array([source is None for source in sources], dtype=bool)
    refuse("source", nobody, sources, "the name of the row's author")
    num_prompt, num_response, num_logprobs = (list_lengths(table.column(name)) for name in LISTS)
    refuse("response_ids", num_response < 1, num_response, "at least one token")
    refuse("prompt_ids", num_prompt < 1, num_prompt, "at least one token")
    lengths = num_prompt + num_response
    limit = f"at most {wanted.max_tokens}, the learner.tokens_per_micro_batch of all who share one"
    refuse("response_ids", lengths > wanted.max_tokens, lengths, limit)
    per_token = "one number for each of the response's tokens"
    refuse("behavior_logprobs", num_logprobs != num_response, num_logprobs, per_token)
    num_trainable = list_lengths(table.column("trainable"))
    given = ~pc.is_null(table.column("trainable")).to_numpy()
    refuse("trainable", given & (num_trainable != num_response), num_trainable, per_token)
    _, most = list_extremes(table.column("trainable"))
    nothing = given & (most == 0)
    refuse("trainable", nothing, most.astype(bool), "true for one token or more")
    if wanted.top_logprobs:
        num_ids, num_theirs = (list_lengths(table.column(name)) for name in TEACHER)
        uneven = (num_ids == 0) | (num_ids != num_top * num_response)
        refuse("top_ids", uneven, num_ids, "as many for each of the response's tokens")
        refuse("top_logprobs", num_theirs != num_ids, num_theirs, "one number for each of top_ids")
    for field in ("prompt_ids", "response_ids", *(TEACHER[:1] if wanted.top_logprobs else ())):
        low, high = list_extremes(table.column(field))
        refuse(field, np.isnan(low), low, "an id in each place")
        refuse(field, low < 0, low, "ids of at least 0")
        refuse(field, high >= wanted.vocab_size, high, f"ids below {wanted.vocab_size}")
    for field in ("behavior_logprobs", *(TEACHER[1:] if wanted.top_logprobs else ())):
        low, high = list_extremes(table.column(field))
        odd = np.where(np.isfinite(low), high, low)
        refuse(field, ~np.isfinite(odd), odd, "finite numbers")
        refuse(field, high > 0.001, high, "logs of probabilities, at most 0")


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Length of each list, 0 for null."""
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy()


def list_extremes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value of each list, float64 [rows]; a NaN is both."""
    whole = column.combine_chunks()
    flat = whole.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    lengths = list_lengths(column)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    filled = lengths > 0
    low, high = np.zeros(len(lengths)), np.zeros(len(lengths))
    if filled.any():
        low[filled] = np.minimum.reduceat(flat, starts[filled])
        high[filled] = np.maximum.reduceat(flat, starts[filled])
    return low, high


def read_row_group(
    group: RowGroup, wanted: RowFilter, split: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """The wanted rows of a split. Where `columns` are named, which must hold those that `wanted`
    looks at, all others are null."""
    names = None if columns is None else list(columns)
    table = conform(pq.ParquetFile(group.file).read_row_group(group.number, columns=names))
    return table.filter(pa.array(wanted.mask(table, split)))


def training_sequences(
    table: pa.Table, negative_coefficient: float, with_teacher: bool = False
) -> list[TrainingSequence]:
    """Rows as training sequences; traces that are known to be wrong get minus the coefficient.
    The behavior policy's likeliest tokens come along only `with_teacher`."""
    teacher = TEACHER if with_teacher else ()
    names = (*LISTS, "correct", "source", "trainable", *teacher)
    columns = [values_of(table, name) for name in names]
    return [
        TrainingSequence.of(
            prompt, response, logprobs, -negative_coefficient if correct is False else 1.0, *others
        )
        for prompt, response, logprobs, correct, *others in zip(*columns, strict=True)
    ]


def values_of(table: pa.Table, name: str) -> list[Any]:
    """A column as numpy arrays where it holds lists; None where there is none."""
    if name not in table.column_names:
        return [None] * table.num_rows
    column = table.column(name)
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    return [
        None if not value.is_valid else value.values.to_numpy(zero_copy_only=False)
        for value in column
    ]


def first_rows(
    groups: Sequence[RowGroup], wanted: RowFilter, split: str, most: int
) -> pa.Table | None:
    """The first rows of a split, at most so many; None where there are none."""
    tables: list[pa.Table] = []
    for group in groups:
        if sum(table.num_rows for table in tables) >= most:
            break
        if group.num_train if split == "train" else group.num_heldout:
            tables.append(read_row_group(group, wanted, split))
    return pa.concat_tables(tables).slice(0, most) if tables else None
