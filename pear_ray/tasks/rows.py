"""Rows of problems, from Parquet or JSON lines on a disk."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.errors import ConfigError

LINES = tuple(
    kind + packed for kind in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst")
)


def check_files(path: str) -> list[Path]:
    """The files that a path names, in the order of their names. In a folder with Parquet that is
    all that counts; files whose names begin with a dot or an underscore do not.

    Raises:
        ConfigError: nothing is there that can be read.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise ConfigError(f"path: read {path!r}, which is not there; expected a file or folder")
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.is_file())
    hidden = {file for file in files if _is_hidden(file, root)}
    parquet = [file for file in files if file.name.endswith(".parquet") and file not in hidden]
    lines = [file for file in files if file.name.endswith(LINES) and file not in hidden]
    if not parquet and not lines:
        raise ConfigError(
            f"path: read {path!r}, which holds no file of a kind that can be read; expected"
            f" .parquet or one of {', '.join(LINES)}"
        )
    return parquet or lines


def read_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """(place, values of the columns) of every row; the place says file and line or row, from 1.

    Raises:
        ConfigError: a file cannot be read, or a row has not all of the columns.
    """
    for file in check_files(path):
        read = _parquet_rows if file.name.endswith(".parquet") else _json_rows
        try:
            yield from read(file, columns)
        except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from error


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(root).parts)


def _parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    with pq.ParquetFile(file) as parquet:
        there = parquet.schema_arrow.names
        missing = [name for name in columns if name not in there]
        if missing:
            raise ConfigError(f"{file}: has columns {sorted(there)}; expected also {missing}")
        number = 0
        for batch in parquet.iter_batches(columns=list(columns)):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:{number}", [row[name] for name in columns]


def _json_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    with pa.input_stream(str(file), compression="detect") as packed:
        for number, line in enumerate(io.BufferedReader(packed), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{file}:{number}: is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{file}:{number}: read {type(row).__name__}, expected an object")
            missing = [name for name in columns if name not in row]
            if missing:
                raise ConfigError(f"{file}:{number}: has {sorted(row)}; expected also {missing}")
            yield f"{file}:{number}", [row[name] for name in columns]
