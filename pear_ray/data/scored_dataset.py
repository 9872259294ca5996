"""The scored dataset: validated once before training, then read as one table of rows per optimizer step.

Ray Data reads ahead while the learners train. An epoch shuffles in two levels: blocks of neighboring rows in random
order form windows, and the rows of a window are permuted. Blocks ignore row groups, which differ when a corpus is
scored again. So the order depends on rows and seed only, and a resumed run only needs the number of rows trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from pear_ray.config import Job
from pear_ray.data.tokenizer import load_tokenizer, num_embeddings, tokenizer_digests
from pear_ray.errors import ConfigError, require
from pear_ray.records import SCORED_SCHEMA, TrainingSequence
from pear_ray.run import read_document
from pear_ray.statistics import seed_of

NUM_READERS = 8
NUM_WINDOW_READERS = 2
# More blocks per window shuffle better, and read more row groups only in part.
BLOCKS_PER_WINDOW = 32
TOKEN_COLUMNS = ("prompt_ids", "response_ids", "behavior_logprobs")
TEACHER_COLUMNS = ("top_ids", "top_logprobs")
OPTIONAL_COLUMNS = {"recorded_gap", "trainable", "truncated", "logprobs_from", *TEACHER_COLUMNS}


@dataclass(frozen=True)
class RowFilter:
    """Requirements on all rows, and which rows are selected. `digests` are those of the model's tokenizer and chat
    template; `max_tokens` is the limit of a sequence. Selected are the rows of `sources` (empty: all), with `negatives`
    also training rows known to be wrong. With `top_logprobs`, rows must have the teacher's top-k log-probs."""

    digests: tuple[str, str]
    vocab_size: int
    max_tokens: int
    negatives: bool
    top_logprobs: bool
    sources: tuple[str, ...] = ()

    @classmethod
    def from_job(cls, job: Job) -> RowFilter:
        """Return what [sft] selects and the job's model requires."""
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
        """Return which rows of a split are selected, bool [rows]. Rows known to be wrong are never imitated, and never
        part of the held-out loss."""
        selected = pc.equal(table.column("split"), split)
        if not (self.negatives and split == "train"):
            selected = pc.and_(selected, pc.fill_null(table.column("correct"), True))
        if self.sources:
            selected = pc.and_(selected, pc.is_in(table.column("source"), pa.array(self.sources)))
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
    require(files, str(folder), ".parquet files of stage `score`", "none")
    # A corpus that another program scored has none.
    if (facts := folder / "facts.json").exists():
        read_document(facts)
    top_k = next(filter(None, map(top_k_of_first_row, files)), 0) if row_filter.top_logprobs else 0
    with ThreadPoolExecutor(NUM_READERS) as pool:
        scanned = pool.map(lambda file: list(scan_file(file, row_filter, top_k)), files)
        groups = [group for in_file in scanned for group in in_file]
    present = sorted({source for group in groups for source in group.sources})
    unknown = sorted(set(row_filter.sources) - set(present))
    require(not unknown, "sft.sources", f"among {present} ({folder})", unknown)
    return groups


def check_enough_rows(job: Job, groups: list[RowGroup]) -> None:
    """Raise ConfigError if a step needs more rows than there are."""
    num_rows = sum(group.num_train for group in groups)
    expected = f"at most {num_rows}, the training rows in {job.scored_folder}"
    require(job.sft.examples_per_step <= num_rows, "sft.examples_per_step", expected, job.sft.examples_per_step)


def top_k_of_first_row(path: Path) -> int:
    """Return k, the teacher's log-probs per response token, which all rows must share; 0 if the first row does not show
    it: `scan_file` then rejects the file."""
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
            holds = found.equals(field.type) or pa.types.is_null(found)
            require(holds, f"{path}: {field.name}", f"type {field.type}", found)
        elif field.name not in OPTIONAL_COLUMNS or (row_filter.top_logprobs and field.name in TEACHER_COLUMNS):
            raise ConfigError(f"{path}: {field.name}: expected this column of stage `score`")
    for number in range(file.num_row_groups):
        try:
            table = with_all_columns(file.read_row_group(number))
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{path}: expected readable pages: {error}") from error
        check_rows(path, table, row_filter, top_k)
        num_train, num_heldout = (int(row_filter.mask(table, s).sum()) for s in ("train", "heldout"))
        yield RowGroup(str(path), number, num_train, num_heldout, tuple(sorted(table["source"].unique().to_pylist())))


def with_all_columns(table: pa.Table) -> pa.Table:
    """Return the columns of `SCORED_SCHEMA`; missing ones are null."""
    for field in SCORED_SCHEMA:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(SCORED_SCHEMA.names).cast(SCORED_SCHEMA)


def check_rows(path: Path, table: pa.Table, row_filter: RowFilter, top_k: int) -> None:
    """Raise ConfigError for the first field with a row that cannot be trained on."""

    def reject(field: str, is_bad: np.ndarray, values: np.ndarray, expected: str) -> None:
        if is_bad.any():
            row = int(is_bad.argmax())
            name = table.column("example_id")[row].as_py()
            raise ConfigError(f"{path}: {name!r}: {field}: expected {expected}, got {values[row]}")

    names = ("tokenizer_digest", "template_digest", "split", "source")
    *digests, splits, sources = (np.array(table.column(name).to_pylist(), dtype=object) for name in names)
    for field, theirs, ours in zip(names[:2], digests, row_filter.digests, strict=True):
        reject(field, theirs != ours, theirs, f"{ours} (the model's)")
    reject("split", ~np.isin(splits, ["train", "heldout"]), splits, "'train' or 'heldout'")
    reject("source", pc.is_null(table.column("source")).to_numpy(), sources, "a name")

    lengths = {name: list_lengths(table.column(name)) for name in (*TOKEN_COLUMNS, "trainable", *TEACHER_COLUMNS)}
    for field in ("response_ids", "prompt_ids"):
        reject(field, lengths[field] < 1, lengths[field], "at least one token")
    num_response = lengths["response_ids"]
    num_tokens = lengths["prompt_ids"] + num_response
    limit = f"at most {row_filter.max_tokens} tokens with the prompt (learner.tokens_per_micro_batch)"
    reject("response_ids", num_tokens > row_filter.max_tokens, num_tokens, limit)
    per_token = "one value per response token"
    reject("behavior_logprobs", lengths["behavior_logprobs"] != num_response, lengths["behavior_logprobs"], per_token)

    has_mask = ~pc.is_null(table.column("trainable")).to_numpy()
    any_trainable = list_extremes(table.column("trainable"))[1]
    reject("trainable", has_mask & (lengths["trainable"] != num_response), lengths["trainable"], per_token)
    reject("trainable", has_mask & (any_trainable == 0), any_trainable.astype(bool), "True for at least one token")

    teacher = TEACHER_COLUMNS if row_filter.top_logprobs else ()
    if teacher:
        num_ids, num_logprobs = (lengths[field] for field in teacher)
        is_uneven = (num_ids == 0) | (num_ids != top_k * num_response)
        reject("top_ids", is_uneven, num_ids, "the same number for every response token")
        reject("top_logprobs", num_logprobs != num_ids, num_logprobs, "one per top_ids")
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
    is_filled = lengths > 0
    starts = (np.cumsum(lengths) - lengths)[is_filled]
    low, high = np.zeros((2, len(lengths)))
    low[is_filled], high[is_filled] = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    return low, high


def read_row_group(group: RowGroup, row_filter: RowFilter, split: str, columns: Sequence[str] = ()) -> pa.Table:
    """Return the selected rows of a split; columns other than `columns` (empty: all) are null. `columns` must include
    those that `row_filter` uses: split, correct and source."""
    table = with_all_columns(pq.ParquetFile(group.file).read_row_group(group.number, columns=columns or None))
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


def training_sequences(table: pa.Table, negative_coefficient: float, teacher: bool = False) -> list[TrainingSequence]:
    """Return rows as training sequences, wrong ones with coefficient `-negative_coefficient`; the teacher's top-k
    log-probs are attached only if `teacher`."""
    table = with_all_columns(table)
    columns = [
        *(table.column(name).to_numpy() for name in TOKEN_COLUMNS),
        *(table.column(name).to_pylist() for name in ("correct", "source")),
        *(table.column(name).to_numpy() for name in ("trainable", *(TEACHER_COLUMNS if teacher else ()))),
    ]
    return [
        TrainingSequence.of(prompt, response, logprobs, -negative_coefficient if correct is False else 1.0, *others)
        for prompt, response, logprobs, correct, *others in zip(*columns, strict=True)
    ]


@dataclass(frozen=True)
class Slice:
    """Training rows `start` to `stop` of a row group."""

    group: RowGroup
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together; the first `num_skipped` of the result were trained on."""

    epoch: int
    number: int
    slices: tuple[Slice, ...]
    num_skipped: int = 0

    @property
    def num_rows(self) -> int:
        """Number of rows, with the skipped ones."""
        return sum(piece.stop - piece.start for piece in self.slices)


def cut_blocks(groups: Sequence[RowGroup], rows_per_block: int) -> list[list[Slice]]:
    """Cut all training rows, in order, into blocks; the last one may be smaller."""
    blocks: list[list[Slice]] = []
    room = 0
    for group in groups:
        start = 0
        while start < group.num_train:
            if not room:
                blocks.append([])
                room = rows_per_block
            stop = min(group.num_train, start + room)
            blocks[-1].append(Slice(group, start, stop))
            room -= stop - start
            start = stop
    return blocks


def windows(groups: list[RowGroup], num_epochs: int, rows_per_window: int, seed: int, skip: int) -> Iterator[Window]:
    """Yield the windows of all epochs after the first `skip` rows."""
    blocks = cut_blocks(groups, -(-rows_per_window // BLOCKS_PER_WINDOW))
    for epoch in range(num_epochs):
        order = np.random.default_rng(seed_of(seed, "sft", epoch)).permutation(len(blocks))
        slices: list[Slice] = []
        number = 0
        for count, block in enumerate(order, 1):
            slices += blocks[block]
            window = Window(epoch, number, tuple(slices), skip)
            if window.num_rows < rows_per_window and count < len(order):
                continue
            if skip < window.num_rows:
                yield window
            skip = max(0, skip - window.num_rows)
            slices, number = [], number + 1


def read_window(batch: dict[str, Any], row_filter: RowFilter, seed: int) -> pa.Table:
    """Return the rows of one window, shuffled; `batch` holds it as a dict (Ray Data's rows)."""
    (window,) = batch["window"]
    groups: dict[tuple[str, int], pa.Table] = {}
    pieces = []
    for piece in window["slices"]:
        group = RowGroup(**piece["group"])
        key = group.file, group.number
        if key not in groups:
            groups[key] = read_row_group(group, row_filter, "train")
        pieces.append(groups[key].slice(piece["start"], piece["stop"] - piece["start"]))
    table = pa.concat_tables(pieces)
    rng = np.random.default_rng(seed_of(seed, "sft", window["epoch"], window["number"]))
    order = rng.permutation(table.num_rows)[window["num_skipped"] :]
    return table.take(pa.array(order)).combine_chunks()


def batches(
    groups: list[RowGroup],
    row_filter: RowFilter,
    *,
    num_epochs: int,
    rows_per_step: int,
    rows_per_window: int,
    seed: int,
    first_step: int,
) -> Iterator[pa.Table]:
    """Yield the rows of each optimizer step from `first_step` on. A step may span two epochs; only the last may be
    smaller."""
    untrained = windows(groups, num_epochs, rows_per_window, seed, skip=first_step * rows_per_step)
    items = [{"window": asdict(window)} for window in untrained]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read_window,
        batch_size=1,
        fn_kwargs={"row_filter": row_filter, "seed": seed},
        # Learners may hold all CPUs; reading takes little of one.
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(NUM_WINDOW_READERS),
    )
    dataset.context.execution_options.preserve_order = True
    dataset.set_name("sft")
    # Plans and progress would fill the job's log; the Ray dashboard shows them.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    yield from dataset.iter_batches(batch_size=rows_per_step, batch_format="pyarrow", prefetch_batches=2)
