"""Corpora as they are found: Parquet or JSON lines, on disk, in an object store or on the hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray.data
from fsspec import AbstractFileSystem
from fsspec.implementations.arrow import ArrowFSWrapper
from ray.data.datasource import FileBasedDatasource

from pear_ray.config import Columns
from pear_ray.errors import ConfigError

LINES = tuple(
    kind + packed for kind in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst")
)
HIDDEN = re.compile(r"(^|/)[._]")
ROWS_PER_BLOCK = 1024
KINDS = f"expected .parquet or one of {', '.join(LINES)}"


@dataclass(frozen=True)
class Files:
    """The files of one corpus, all of one kind, and a fingerprint of their names, sizes and
    times."""

    system: AbstractFileSystem
    paths: tuple[str, ...]
    are_parquet: bool
    fingerprint: str


class JsonLines(FileBasedDatasource):
    """Lines of text, undecoded, with the place where they stand. Ray Data's own readers of JSON
    and text take a whole file into memory, and the former stops at the first bad line."""

    def _read_stream(self, f: pa.NativeFile, path: str) -> Iterator[pa.Table]:
        texts: list[bytes] = []
        places: list[str] = []
        name = path.rpartition("/")[2]
        for number, line in enumerate(whole_lines(f, path), start=1):
            if line.strip():
                texts.append(line)
                places.append(f"{name}:{number}")
            if len(texts) == ROWS_PER_BLOCK:
                yield pa.table({"text": texts, "place": places})
                texts, places = [], []
        if texts:
            yield pa.table({"text": texts, "place": places})


def whole_lines(f: pa.NativeFile, path: str, num_bytes: int = 2**20) -> Iterator[bytes]:
    """The lines of a stream, which is read piece by piece.

    Raises:
        OSError: it breaks off, or is not compressed as its name says; tells the path.
    """
    rest = b""
    try:
        while piece := f.read(num_bytes):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
    except OSError as error:
        raise OSError(f"{path}: {error}") from error
    if rest:
        yield rest


def find(path: str) -> Files:
    """What a path, a folder or a pattern names.

    Raises:
        ConfigError: nothing is there, or it cannot be reached, or of no known kind.
    """
    try:
        system, name = filesystem_of(path)
        if system.isfile(name):
            found = {name: system.info(name)}
        elif any(sign in name for sign in "*["):
            found = system.glob(name, detail=True)
        else:
            found = system.find(name, detail=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"corpus.path: {path} cannot be reached: {error}") from error
    files = {file: info for file, info in sorted(found.items()) if info["type"] == "file"}
    # As Ray Data does, leave out what other programs put beside data.
    root = re.split(r"[*\[]", name)[0]
    names = [file for file in files if not HIDDEN.search(file.removeprefix(root))]
    parquet = tuple(file for file in names if file.endswith(".parquet"))
    lines = tuple(file for file in names if file.endswith(LINES))
    if parquet:
        # A folder of Parquet may hold JSON that describes it.
        lines = tuple(file for file in lines if not file.endswith(".json"))
    if parquet and lines:
        raise ConfigError(
            f"corpus.path: {path} holds {parquet[0]} and {lines[0]}; expected files of one kind"
            " (a pattern can choose)"
        )
    if not parquet and not lines:
        raise ConfigError(f"corpus.path: {path} holds no file that can be read; {KINDS}")
    chosen = parquet or lines
    facts = [(file, files[file].get("size"), str(files[file].get("mtime"))) for file in chosen]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return Files(system, chosen, bool(parquet), digest)


def filesystem_of(path: str) -> tuple[AbstractFileSystem, str]:
    """Where a path leads: the disk, the hub, or what pyarrow knows by the scheme."""
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return HfFileSystem(), path.removeprefix("hf://")
    if "://" in path:
        system, name = pyarrow.fs.FileSystem.from_uri(path)
        return ArrowFSWrapper(system), name
    return ArrowFSWrapper(pyarrow.fs.LocalFileSystem()), os.path.abspath(os.path.expanduser(path))


def read(files: Files, columns: Columns) -> ray.data.Dataset:
    """The rows as they stand: Parquet with those of its columns that are asked for, JSON as lines
    in `text` and `place`.

    Raises:
        ConfigError: a file cannot be read, or no column holds conversations.
    """
    paths = list(files.paths)
    if not files.are_parquet:
        # Reading waits for storage; less than a CPU leaves the rest to the tokenizers.
        return ray.data.read_datasource(JsonLines(paths, filesystem=files.system), num_cpus=0.5)
    there = parquet_columns(files.system, paths[0])
    wanted = [name for name in columns.model_dump().values() if name in there]
    conversation = (
        [columns.messages] if columns.prompt is None else [columns.prompt, columns.response]
    )
    missing = [name for name in conversation if name not in there]
    if missing:
        raise ConfigError(
            f"corpus.path: {paths[0]} has columns {sorted(there)}; expected also {missing} (or"
            " other names in [corpus.columns])"
        )
    # Each of Ray Data's readers of file footers is a process; it would start eight for one file.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", str(min(8, len(paths))))
    return ray.data.read_parquet(paths, filesystem=files.system, columns=sorted(set(wanted)))


def parquet_columns(system: AbstractFileSystem, path: str) -> list[str]:
    """Top-level columns of a Parquet file.

    Raises:
        ConfigError: it is none.
    """
    try:
        with system.open(path) as file:
            return pq.read_schema(file).names
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"corpus.path: {path} cannot be read as Parquet: {error}") from error
