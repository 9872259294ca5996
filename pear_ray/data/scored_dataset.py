"""The scored dataset: validated once before training, then read row group by row group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_ray.config import Job
from pear_ray.errors import ConfigError
from pear_ray.records import SCORED_SCHEMA, TrainingSequence

NUM_READERS = 8
TOKEN_COLUMNS = ("prompt_ids", "response_ids", "behavior_logprobs")
TEACHER_COLUMNS = ("top_ids", "top_logprobs")
OPTIONAL_COLUMNS = {"recorded_gap", "trainable", "truncated", "logprobs_from", *TEACHER_COLUMNS}


@dataclass(frozen=True)
class RowFilter:
    """Requirements on all rows, and which rows are selected.

    `digests` are those of the model's tokenizer and chat template; `max_tokens` is the limit of a sequence. Selected
    are the rows of `sources` (empty: all), with `negatives` also training rows known to be wrong. With `top_logprobs`,
    rows must have the teacher's top-k log-probs.
    """

    digests: tuple[str, str]
    vocab_size: int
    max_tokens: int
    negatives: bool
    top_logprobs: bool
    sources: tuple[str, ...] = ()

    @classmethod
    def from_job(cls, job: Job) -> RowFilter:
        """Return what [sft] selects and the job's model requires."""
        # Processes that only read rows start faster without tokenizers.
        from pear_ray.data.tokenizer import load_tokenizer, num_embeddings, tokenizer_digests

        path = job.model_path()
        return cls(
            digests=tokenizer_digests(load_tokenizer(path)),
            vocab_size=num_embeddings(path),
            max_tokens=job.learner.tokens_per_pack,
            negatives=job.sft.negatives,
            top_logprobs=job.sft.objective.type == "kl",
            sources=job.sft.sources,
        )

    def mask(self, table: pa.Table, split: str) -> np.ndarray:
        """Return which rows of a split are selected, bool [rows].

        Rows known to be wrong are never imitated, and never part of the held-out loss.
        """
        selected = pc.equal(table.column("split"), split)
        if not (self.negatives and split == "train"):
            selected = pc.and_(selected, pc.fill_null(table.column("correct"), True))
        if self.sources:
            of_sources = pc.is_in(table.column("source"), pa.array(self.sources))
            selected = pc.and_(selected, of_sources)
        return selected.to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file: selected rows per split, and the sources of all its rows."""

    file: str
    number: int
    num_train: int
    num_heldout: int
    sources: tuple[str, ...]


def scan_dataset(folder: Path, row_filter: RowFilter) -> list[RowGroup]:
    """Return the row groups in the order of the files; raise ConfigError for the first bad row."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise ConfigError(f"{folder}: expected .parquet files of stage `score`, got none")
    ks = (top_k_of_first_row(file) for file in files if row_filter.top_logprobs)
    top_k = next((k for k in ks if k), 0)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        scanned = pool.map(lambda file: list(scan_file(file, row_filter, top_k)), files)
        groups = [group for in_file in scanned for group in in_file]
    present = sorted({source for group in groups for source in group.sources})
    if unknown := sorted(set(row_filter.sources) - set(present)):
        raise ConfigError(f"sft.sources: expected among {present} ({folder}), got {unknown}")
    return groups


def check_enough_rows(job: Job, groups: list[RowGroup]) -> None:
    """Raise ConfigError if a step needs more rows than there are."""
    num_rows = sum(group.num_train for group in groups)
    if num_rows < job.sft.examples_per_step:
        raise ConfigError(
            f"sft.examples_per_step: expected at most {num_rows}, the training rows in"
            f" {job.scored_folder}, got {job.sft.examples_per_step}"
        )


def top_k_of_first_row(path: Path) -> int:
    """Return k, the teacher's log-probs per response token; all rows must have the same.

    0 if the first row does not show it; `scan_file` then rejects the file.
    """
    try:
        first = with_all_columns(pq.ParquetFile(path).read_row_group(0)).slice(0, 1)
    except (pa.ArrowException, OSError, IndexError):
        return 0
    num_top, num_response = (list_lengths(first.column(c)) for c in ("top_ids", "response_ids"))
    return int(num_top[0] // num_response[0]) if num_response.any() else 0


def scan_file(path: Path, row_filter: RowFilter, top_k: int) -> Iterator[RowGroup]:
    """Validate one file and yield its row groups."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path}: expected Parquet of stage `score`: {error}") from error
    for field in SCORED_SCHEMA:
        if field.name in file.schema_arrow.names:
            found = file.schema_arrow.field(field.name).type
            if not (found.equals(field.type) or pa.types.is_null(found)):
                raise ConfigError(f"{path}: {field.name}: expected type {field.type}, got {found}")
        elif field.name not in OPTIONAL_COLUMNS or (row_filter.top_logprobs and field.name in TEACHER_COLUMNS):
            raise ConfigError(f"{path}: {field.name}: expected this column of stage `score`")
    for number in range(file.num_row_groups):
        try:
            table = with_all_columns(file.read_row_group(number))
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{path}: expected readable pages: {error}") from error
        check_rows(path, table, row_filter, top_k)
        num_train, num_heldout = (int(row_filter.mask(table, s).sum()) for s in ("train", "heldout"))
        sources = tuple(sorted(set(table.column("source").to_pylist())))
        yield RowGroup(str(path), number, num_train, num_heldout, sources)


def with_all_columns(table: pa.Table) -> pa.Table:
    """Return the columns of `SCORED_SCHEMA`; missing ones are null."""
    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in SCORED_SCHEMA
    ]
    return pa.table(columns, schema=SCORED_SCHEMA)


def check_rows(path: Path, table: pa.Table, row_filter: RowFilter, top_k: int) -> None:
    """Raise ConfigError for the first field with a row that cannot be trained on."""

    def reject(field: str, is_bad: np.ndarray, values: np.ndarray, expected: str) -> None:
        if is_bad.any():
            row = int(is_bad.argmax())
            name = table.column("example_id")[row].as_py()
            raise ConfigError(f"{path}: {name!r}: {field}: expected {expected}, got {values[row]}")

    def objects(field: str) -> np.ndarray:
        return np.array(table.column(field).to_pylist(), dtype=object)

    def lengths(field: str) -> np.ndarray:
        return list_lengths(table.column(field))

    for field, ours in zip(("tokenizer_digest", "template_digest"), row_filter.digests, strict=True):
        theirs = objects(field)
        reject(field, theirs != ours, theirs, f"{ours} (the model's)")
    splits, sources = objects("split"), objects("source")
    reject("split", ~np.isin(splits, ["train", "heldout"]), splits, "'train' or 'heldout'")
    reject("source", np.array([source is None for source in sources]), sources, "a name")

    num_prompt, num_response, num_logprobs = map(lengths, TOKEN_COLUMNS)
    reject("response_ids", num_response < 1, num_response, "at least one token")
    reject("prompt_ids", num_prompt < 1, num_prompt, "at least one token")
    num_tokens = num_prompt + num_response
    limit = f"at most {row_filter.max_tokens} tokens with the prompt (learner.tokens_per_micro_batch)"
    reject("response_ids", num_tokens > row_filter.max_tokens, num_tokens, limit)
    per_token = "one value per response token"
    reject("behavior_logprobs", num_logprobs != num_response, num_logprobs, per_token)

    has_mask = ~pc.is_null(table.column("trainable")).to_numpy()
    num_flags, any_trainable = lengths("trainable"), list_extremes(table.column("trainable"))[1]
    reject("trainable", has_mask & (num_flags != num_response), num_flags, per_token)
    none_trainable = has_mask & (any_trainable == 0)
    reject("trainable", none_trainable, any_trainable.astype(bool), "True for at least one token")

    teacher = TEACHER_COLUMNS if row_filter.top_logprobs else ()
    if teacher:
        num_ids, num_top_logprobs = map(lengths, teacher)
        is_uneven = (num_ids == 0) | (num_ids != top_k * num_response)
        reject("top_ids", is_uneven, num_ids, "the same number for every response token")
        reject("top_logprobs", num_top_logprobs != num_ids, num_top_logprobs, "one per top_ids")
    for field in ("prompt_ids", "response_ids", *teacher[:1]):
        low, high = list_extremes(table.column(field))
        reject(field, np.isnan(low), low, "no null")
        reject(field, low < 0, low, "ids of at least 0")
        reject(field, high >= row_filter.vocab_size, high, f"ids below {row_filter.vocab_size}")
    for field in ("behavior_logprobs", *teacher[1:]):
        low, high = list_extremes(table.column(field))
        suspect = np.where(np.isfinite(low), high, low)
        reject(field, ~np.isfinite(suspect), suspect, "finite values")
        reject(field, high > 0.001, high, "log-probs of at most 0")


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Return the length of each list, 0 for null."""
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy()


def list_extremes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return minimum and maximum of each list, float64 [rows]: NaN if it has one, 0 if empty."""
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    lengths = list_lengths(column)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    is_filled = lengths > 0
    low, high = np.zeros(len(lengths)), np.zeros(len(lengths))
    if is_filled.any():
        low[is_filled] = np.minimum.reduceat(values, starts[is_filled])
        high[is_filled] = np.maximum.reduceat(values, starts[is_filled])
    return low, high


def read_row_group(
    group: RowGroup, row_filter: RowFilter, split: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """Return the selected rows of a split; columns other than `columns` (None: all) are null.

    `columns` must include those that `row_filter` uses: split, correct and source.
    """
    names = None if columns is None else list(columns)
    table = with_all_columns(pq.ParquetFile(group.file).read_row_group(group.number, columns=names))
    return table.filter(pa.array(row_filter.mask(table, split)))


def first_rows(groups: Sequence[RowGroup], row_filter: RowFilter, split: str, limit: int) -> pa.Table | None:
    """Return the first rows of a split, at most `limit`; None if it has none."""
    tables: list[pa.Table] = []
    for group in groups:
        if sum(table.num_rows for table in tables) >= limit:
            break
        if group.num_train if split == "train" else group.num_heldout:
            tables.append(read_row_group(group, row_filter, split))
    return pa.concat_tables(tables).slice(0, limit) if tables else None


def training_sequences(
    table: pa.Table, negative_coefficient: float, with_teacher: bool = False
) -> list[TrainingSequence]:
    """Return rows as training sequences, wrong ones with coefficient `-negative_coefficient`.

    The teacher's top-k log-probs are attached only `with_teacher`.
    """
    table = with_all_columns(table)
    lists = ("trainable", *(TEACHER_COLUMNS if with_teacher else ()))
    columns = [
        *(table.column(name).to_numpy() for name in TOKEN_COLUMNS),
        *(table.column(name).to_pylist() for name in ("correct", "source")),
        *(table.column(name).to_numpy() for name in lists),
    ]
    return [
        TrainingSequence.of(prompt, response, logprobs, -negative_coefficient if correct is False else 1.0, *others)
        for prompt, response, logprobs, correct, *others in zip(*columns, strict=True)
    ]
