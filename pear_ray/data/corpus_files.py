"""Corpus files, Parquet or JSON lines, on disk, in an object store or on the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray.data
from fsspec import AbstractFileSystem
from fsspec.implementations.arrow import ArrowFSWrapper
from ray.data.datasource import FileBasedDatasource

from pear_ray.config import Columns
from pear_ray.data.tokenizer import fingerprint
from pear_ray.errors import ConfigError, require

JSON_SUFFIXES = tuple(suffix + packed for suffix in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst"))
# A path component that starts with a dot or an underscore; Ray Data skips them too.
HIDDEN = re.compile(r"(^|/)[._]")
ROWS_PER_BLOCK = 1024


@dataclass(frozen=True)
class CorpusFiles:
    """The files of one corpus, all of one kind; `digest` covers their names, sizes and times."""

    path: str
    filesystem: AbstractFileSystem
    paths: tuple[str, ...]
    are_parquet: bool
    digest: str


class JsonLines(FileBasedDatasource):
    """Undecoded lines of text with their position, `FILE:LINE`. Ray Data 2.x's readers of JSON and text load whole
    files; the former stops at a bad line."""

    def _read_stream(self, f: pa.NativeFile, path: str) -> Iterator[pa.Table]:
        name = path.rpartition("/")[2]
        numbered = enumerate(read_lines(f, path), start=1)
        rows = ({"text": line, "place": f"{name}:{number}"} for number, line in numbered if line.strip())
        while block := list(islice(rows, ROWS_PER_BLOCK)):
            yield pa.Table.from_pylist(block)


def read_lines(stream: pa.NativeFile, path: str, chunk_bytes: int = 2**20) -> Iterator[bytes]:
    """Yield the lines of a stream, read in chunks. Raise OSError, naming `path`, if it is truncated or not compressed
    as its name claims."""
    rest = b""
    try:
        while chunk := stream.read(chunk_bytes):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
    except OSError as error:
        raise OSError(f"{path}: {error}") from error
    if rest:
        yield rest


def find_corpus_files(path: str) -> CorpusFiles:
    """Return the corpus files of a path, a folder or a pattern, in the order of their names. Raise ConfigError if the
    path cannot be reached or does not match files of exactly one kind."""
    try:
        filesystem, name = resolve_filesystem(path)
        if filesystem.isfile(name):
            infos = {name: filesystem.info(name)}
        elif any(sign in name for sign in "*["):
            infos = filesystem.glob(name, detail=True)
        else:
            infos = filesystem.find(name, detail=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"corpus.path: {path} cannot be reached: {error}") from error
    files = [file for file in sorted(infos) if infos[file]["type"] == "file"]
    root = re.split(r"[*\[]", name)[0]
    visible = [file for file in files if not HIDDEN.search(file.removeprefix(root))]
    parquet = [file for file in visible if file.endswith(".parquet")]
    # Beside Parquet, a .json file is metadata.
    lines = [file for file in visible if file.endswith(JSON_SUFFIXES) and not (parquet and file.endswith(".json"))]
    if parquet and lines:
        raise ConfigError(
            f"corpus.path: expected files of one kind (a pattern can select them), got {parquet[0]} and {lines[0]}"
        )
    paths = parquet or lines
    require(paths, "corpus.path", f".parquet or one of {', '.join(JSON_SUFFIXES)}", f"{path} without such a file")
    facts = [(file, infos[file].get("size"), str(infos[file].get("mtime"))) for file in paths]
    return CorpusFiles(path, filesystem, tuple(paths), bool(parquet), fingerprint(json.dumps(facts)))


def resolve_filesystem(path: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a path (local, hub, or by scheme) and the path within it."""
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return HfFileSystem(), path.removeprefix("hf://")
    if "://" in path:
        filesystem, name = pyarrow.fs.FileSystem.from_uri(path)
        return ArrowFSWrapper(filesystem), name
    return ArrowFSWrapper(pyarrow.fs.LocalFileSystem()), os.path.abspath(os.path.expanduser(path))


def read_corpus(files: CorpusFiles, columns: Columns) -> ray.data.Dataset:
    """Read rows: Parquet with the columns that the job names, JSON lines as `text` and `place`. Raise ConfigError if a
    file cannot be read or no column holds conversations."""
    paths = list(files.paths)
    if not files.are_parquet:
        # Reading waits for storage: a fraction of a CPU leaves the rest to tokenization.
        return ray.data.read_datasource(JsonLines(paths, filesystem=files.filesystem), num_cpus=0.5)
    present = parquet_columns(files.filesystem, paths[0])
    needed = [columns.messages] if columns.prompt is None else [columns.prompt, columns.response]
    missing = [name for name in needed if name not in present]
    expected = f"columns {missing} (or other names in [corpus.columns])"
    require(not missing, f"corpus.path: {paths[0]}", expected, sorted(present))
    used = {name for name in columns.model_dump().values() if name in present}
    # Each reader of Parquet footers is a process; Ray Data would start eight for a single file.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", str(min(8, len(paths))))
    return ray.data.read_parquet(paths, filesystem=files.filesystem, columns=sorted(used))


def parquet_columns(filesystem: AbstractFileSystem, path: str) -> list[str]:
    """Return a Parquet file's top-level columns; raise ConfigError if it is not Parquet."""
    try:
        with filesystem.open(path) as file:
            return pq.read_schema(file).names
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"corpus.path: {path} cannot be read as Parquet: {error}") from error
