"""Corpus files: which files a path matches, and JSON lines with their positions."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_ray.data.corpus_files import (
    JSON_SUFFIXES,
    ROWS_PER_BLOCK,
    JsonLines,
    find_corpus_files,
    parquet_columns,
    read_lines,
    resolve_filesystem,
)
from pear_ray.errors import ConfigError

LINE = b'{"example_id": "a"}\n'


def write_files(folder, *names):
    """Write files of these names; return the folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"example_id": ["a"], "source": ["teacher_plain"]}), path)
        else:
            path.write_bytes(LINE)
    return folder


def names(files, folder):
    return [path.removeprefix(f"{folder}/") for path in files.paths]


@pytest.mark.parametrize("name", ["a.parquet", *(f"a{kind}" for kind in JSON_SUFFIXES)])
def test_each_kind_of_file_is_found(tmp_path, name):
    files = find_corpus_files(str(write_files(tmp_path, name, "other.jsonl", "other.parquet") / name))
    assert names(files, tmp_path) == [name]
    assert files.are_parquet == (name == "a.parquet")
    with files.filesystem.open(files.paths[0]) as file:
        assert file.read() == (tmp_path / name).read_bytes()


def test_folder_is_searched_recursively_in_name_order(tmp_path):
    write_files(tmp_path, "c.jsonl", "a.json.gz", "b/c/d.ndjson.zst", "b/a.json", "README.md", "a.txt")
    files = find_corpus_files(str(tmp_path))
    assert names(files, tmp_path) == ["a.json.gz", "b/a.json", "b/c/d.ndjson.zst", "c.jsonl"]
    assert not files.are_parquet


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[bc].jsonl", ["b.jsonl"]),
        ("*/*.jsonl", ["x/a.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "x/a.jsonl"]),
        ("*.parquet", ["a.parquet"]),
    ],
)
def test_pattern_selects_matching_files(tmp_path, pattern, expected):
    write_files(tmp_path, "a.jsonl", "b.jsonl", "x/a.jsonl", "a.parquet", "x/a.txt")
    files = find_corpus_files(str(tmp_path / pattern))
    assert names(files, tmp_path) == expected
    assert files.are_parquet == (pattern == "*.parquet")


def test_relative_paths_and_urls_are_equivalent(tmp_path, monkeypatch):
    write_files(tmp_path, "a.jsonl")
    monkeypatch.chdir(tmp_path)
    whole = find_corpus_files(str(tmp_path / "a.jsonl"))
    for path in ("a.jsonl", "./a.jsonl", "*.jsonl", f"file://{tmp_path}/a.jsonl"):
        files = find_corpus_files(path)
        assert (files.paths, files.digest) == (whole.paths, whole.digest)


def test_hidden_files_are_skipped(tmp_path):
    write_files(tmp_path, "a.jsonl", ".a.jsonl", "_a.jsonl", "x/.b.jsonl", "x/_b.parquet")
    assert names(find_corpus_files(str(tmp_path)), tmp_path) == ["a.jsonl"]


def test_json_beside_parquet_is_metadata(tmp_path):
    write_files(tmp_path, "data/b.parquet", "data/a.parquet", "dataset_info.json", "state.json")
    files = find_corpus_files(str(tmp_path))
    assert names(files, tmp_path) == ["data/a.parquet", "data/b.parquet"]
    assert files.are_parquet


@pytest.mark.parametrize("other", ["c.jsonl", "c.json.gz", "x/c.ndjson"])
def test_mixed_kinds_are_rejected(tmp_path, other):
    write_files(tmp_path, "a.parquet", other)
    with pytest.raises(ConfigError) as error:
        find_corpus_files(str(tmp_path))
    assert str(error.value) == (
        "corpus.path: expected files of one kind (a pattern can select them), got"
        f" {tmp_path}/a.parquet and {tmp_path}/{other}"
    )


@pytest.mark.parametrize("path", ["a.csv", "x", "empty", "nowhere", "nowhere/*.jsonl", "*.tar"])
def test_path_without_readable_files_is_rejected(tmp_path, path):
    write_files(tmp_path, "a.csv", "x/a.txt", "x/.a.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as error:
        find_corpus_files(str(tmp_path / path))
    message = str(error.value)
    assert message.startswith("corpus.path: expected .parquet or one of .jsonl, .jsonl.gz, .jsonl")
    assert f"got {tmp_path}/{path}" in message


@pytest.mark.parametrize("path", ["ftp://host/a.jsonl", "s3://bucket/a.jsonl?color=red"])
def test_unknown_address_is_rejected(path):
    with pytest.raises(ConfigError) as error:
        find_corpus_files(path)
    assert str(error.value).startswith(f"corpus.path: {path} cannot be reached: ")


@pytest.mark.parametrize(
    ("address", "protocol", "expected"),
    [
        ("s3://bucket/x/*.jsonl?endpoint_override=127.0.0.1:1&scheme=http&region=x", "s3", "bucket/x/*.jsonl"),
        ("hf://datasets/owner/name/data", "hf", "datasets/owner/name/data"),
    ],
)
def test_object_store_is_resolved_without_a_request(address, protocol, expected):
    system, name = resolve_filesystem(address)
    assert (system.protocol, name) == (protocol, expected)


def test_digest_covers_names_sizes_and_times(tmp_path):
    write_files(tmp_path, "a.jsonl", "b.jsonl", "other.txt")
    os.utime(tmp_path / "a.jsonl", (1, 1))
    seen = [find_corpus_files(str(tmp_path)).digest]
    assert find_corpus_files(str(tmp_path)).digest == seen[0]
    assert find_corpus_files(str(tmp_path / "*.jsonl")).digest == seen[0]

    os.utime(tmp_path / "a.jsonl", (2, 2))
    seen.append(find_corpus_files(str(tmp_path)).digest)
    (tmp_path / "a.jsonl").write_bytes(LINE * 2)
    os.utime(tmp_path / "a.jsonl", (2, 2))
    seen.append(find_corpus_files(str(tmp_path)).digest)
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    seen.append(find_corpus_files(str(tmp_path)).digest)
    write_files(tmp_path, "d.jsonl")
    seen.append(find_corpus_files(str(tmp_path)).digest)
    assert len(set(seen)) == 5

    # Files that are not read do not count.
    write_files(tmp_path, "more.txt", ".d.jsonl")
    assert find_corpus_files(str(tmp_path)).digest == seen[-1]


@given(
    text=st.lists(st.sampled_from([b"\n", b"\r", b"a", b"\0", b"\xff", b" "])).map(b"".join),
    chunk_bytes=st.integers(1, 9),
)
def test_lines_do_not_depend_on_chunk_size(text, chunk_bytes):
    expected = text.split(b"\n")
    if not expected[-1]:
        # A final newline starts no line.
        expected.pop()
    assert list(read_lines(pa.BufferReader(text), "x.jsonl", chunk_bytes)) == expected


@pytest.mark.parametrize(("text", "expected"), [(b"", []), (b"a", [b"a"]), (b"\n", [b""])])
def test_lines_of_shortest_texts(text, expected):
    assert list(read_lines(pa.BufferReader(text), "x.jsonl")) == expected


def test_line_may_be_longer_than_a_chunk():
    text = b"a" * (2**20 + 1) + b"\n" + b"b" * 2**20
    assert [len(line) for line in read_lines(pa.BufferReader(text), "x.jsonl")] == [2**20 + 1, 2**20]


def read_blocks(text, path="bucket/folder/f.jsonl.gz"):
    """Read blocks as Ray Data does, without the constructor, which would start Ray."""
    source = object.__new__(JsonLines)
    return list(source._read_stream(pa.BufferReader(text), path))


def test_line_numbers_count_blank_lines():
    (block,) = read_blocks(b'\n{"a": 1}\r\n\n \t\n[\xff\n\r\nlast')
    assert block.to_pydict() == {
        "text": [b'{"a": 1}\r', b"[\xff", b"last"],
        "place": ["f.jsonl.gz:2", "f.jsonl.gz:5", "f.jsonl.gz:7"],
    }
    assert block.schema.types == [pa.binary(), pa.string()]


@pytest.mark.parametrize("text", [b"", b"\n", b" \n\r\n\n"])
def test_blank_file_has_no_blocks(text):
    assert read_blocks(text) == []


@pytest.mark.parametrize("num_lines", [ROWS_PER_BLOCK, ROWS_PER_BLOCK + 1, 2 * ROWS_PER_BLOCK])
def test_long_file_is_read_in_blocks(num_lines):
    lines = [json.dumps({"example_id": n}).encode() for n in range(num_lines)]
    # A blank line after every seventh: counted, but not stored.
    text = b"".join(line + b"\n" * (2 if n % 7 == 6 else 1) for n, line in enumerate(lines))
    blocks = read_blocks(text)
    whole, rest = divmod(num_lines, ROWS_PER_BLOCK)
    assert [block.num_rows for block in blocks] == [ROWS_PER_BLOCK] * whole + [rest][: rest > 0]
    table = pa.concat_tables(blocks)
    assert table.column("text").to_pylist() == lines
    places = [f"f.jsonl.gz:{n + n // 7 + 1}" for n in range(num_lines)]
    assert table.column("place").to_pylist() == places


def test_parquet_columns_are_top_level(tmp_path):
    table = pa.table({"messages": [[{"role": "user", "content": "w1"}]], "source": ["teacher_plain"]})
    pq.write_table(table, tmp_path / "a.parquet")
    files = find_corpus_files(str(tmp_path))
    assert parquet_columns(files.filesystem, files.paths[0]) == ["messages", "source"]


@pytest.mark.parametrize("content", [b"", b"PAR1", LINE * 9, b"PAR1" + b"\0" * 64 + b"PAR1"])
def test_file_that_is_not_parquet_is_rejected(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    files = find_corpus_files(str(tmp_path))
    with pytest.raises(ConfigError) as error:
        parquet_columns(files.filesystem, files.paths[0])
    assert str(error.value).startswith(f"corpus.path: {tmp_path}/a.parquet cannot be read")


def test_missing_parquet_file_is_rejected(tmp_path):
    files = find_corpus_files(str(write_files(tmp_path, "a.parquet")))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ConfigError, match=r"a\.parquet cannot be read as Parquet: "):
        parquet_columns(files.filesystem, files.paths[0])


def test_hidden_folders_are_skipped_unless_named(tmp_path):
    for folder in (".cache", "_tmp", "good"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text("{}")
    assert [path.split("/")[-2] for path in find_corpus_files(str(tmp_path)).paths] == ["good"]
    assert [path.split("/")[-2] for path in find_corpus_files(str(tmp_path / "*" / "*.jsonl")).paths] == ["good"]
    assert len(find_corpus_files(str(tmp_path / ".cache")).paths) == 1
    assert len(find_corpus_files(str(tmp_path / "_tmp" / "x.jsonl")).paths) == 1


def test_existing_file_wins_over_pattern(tmp_path):
    (tmp_path / "a[1].jsonl").write_text("{}")
    assert find_corpus_files(str(tmp_path / "a[1].jsonl")).paths == (str(tmp_path / "a[1].jsonl"),)
