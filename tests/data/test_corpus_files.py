"""Corpora as they are found: which files a path names, and their lines with their places."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_ray.data.corpus_files import (
    LINES,
    ROWS_PER_BLOCK,
    JsonLines,
    filesystem_of,
    find,
    parquet_columns,
    whole_lines,
)
from pear_ray.errors import ConfigError

LINE = b'{"example_id": "a"}\n'


def made(folder, *names):
    """The folder, with files of these names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"example_id": ["a"], "source": ["tutor"]}), path)
        else:
            path.write_bytes(LINE)
    return folder


def names_of(files, folder):
    return [path.removeprefix(f"{folder}/") for path in files.paths]


@pytest.mark.parametrize("name", ["a.parquet", *(f"a{kind}" for kind in LINES)])
def test_a_file_of_each_kind_is_found(tmp_path, name):
    files = find(str(made(tmp_path, name, "other.jsonl", "other.parquet") / name))
    assert names_of(files, tmp_path) == [name]
    assert files.are_parquet == (name == "a.parquet")
    with files.system.open(files.paths[0]) as file:
        assert file.read() == (tmp_path / name).read_bytes()


def test_a_folder_is_read_with_what_is_below_it_in_the_order_of_names(tmp_path):
    made(tmp_path, "c.jsonl", "a.json.gz", "b/c/d.ndjson.zst", "b/a.json", "README.md", "a.txt")
    files = find(str(tmp_path))
    assert names_of(files, tmp_path) == ["a.json.gz", "b/a.json", "b/c/d.ndjson.zst", "c.jsonl"]
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
def test_a_pattern_names_the_files_that_fit_it(tmp_path, pattern, expected):
    made(tmp_path, "a.jsonl", "b.jsonl", "x/a.jsonl", "a.parquet", "x/a.txt")
    files = find(str(tmp_path / pattern))
    assert names_of(files, tmp_path) == expected
    assert files.are_parquet == (pattern == "*.parquet")


def test_a_path_may_stand_relative_to_the_working_folder_or_be_an_address(tmp_path, monkeypatch):
    made(tmp_path, "a.jsonl")
    monkeypatch.chdir(tmp_path)
    whole = find(str(tmp_path / "a.jsonl"))
    for path in ("a.jsonl", "./a.jsonl", "*.jsonl", f"file://{tmp_path}/a.jsonl"):
        files = find(path)
        assert (files.paths, files.fingerprint) == (whole.paths, whole.fingerprint)


def test_hidden_files_are_left_out(tmp_path):
    made(tmp_path, "a.jsonl", ".a.jsonl", "_a.jsonl", "x/.b.jsonl", "x/_b.parquet")
    assert names_of(find(str(tmp_path)), tmp_path) == ["a.jsonl"]


def test_json_beside_parquet_describes_it(tmp_path):
    made(tmp_path, "data/b.parquet", "data/a.parquet", "dataset_info.json", "state.json")
    files = find(str(tmp_path))
    assert names_of(files, tmp_path) == ["data/a.parquet", "data/b.parquet"]
    assert files.are_parquet


@pytest.mark.parametrize("other", ["c.jsonl", "c.json.gz", "x/c.ndjson"])
def test_files_of_two_kinds_are_refused(tmp_path, other):
    made(tmp_path, "a.parquet", other)
    with pytest.raises(ConfigError) as refusal:
        find(str(tmp_path))
    assert str(refusal.value) == (
        f"corpus.path: {tmp_path} holds {tmp_path}/a.parquet and {tmp_path}/{other};"
        " expected files of one kind (a pattern can choose)"
    )


@pytest.mark.parametrize("path", ["a.csv", "x", "empty", "nowhere", "nowhere/*.jsonl", "*.tar"])
def test_a_path_without_a_file_that_can_be_read_is_refused(tmp_path, path):
    made(tmp_path, "a.csv", "x/a.txt", "x/.a.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as refusal:
        find(str(tmp_path / path))
    assert str(refusal.value).startswith(
        f"corpus.path: {tmp_path}/{path} holds no file that can be read;"
        " expected .parquet or one of .jsonl, .jsonl.gz, .jsonl.zst, .ndjson"
    )


@pytest.mark.parametrize("path", ["ftp://host/a.jsonl", "s3://bucket/a.jsonl?color=red"])
def test_a_path_that_leads_nowhere_known_is_refused(path):
    with pytest.raises(ConfigError) as refusal:
        find(path)
    assert str(refusal.value).startswith(f"corpus.path: {path} cannot be reached: ")


@pytest.mark.parametrize(
    ("address", "protocol", "expected"),
    [
        (
            "s3://bucket/x/*.jsonl?endpoint_override=127.0.0.1:1&scheme=http&region=x",
            "s3",
            "bucket/x/*.jsonl",
        ),
        ("hf://datasets/owner/name/data", "hf", "datasets/owner/name/data"),
    ],
)
def test_a_store_is_named_without_being_asked(address, protocol, expected):
    system, name = filesystem_of(address)
    assert (system.protocol, name) == (protocol, expected)


def test_the_fingerprint_is_of_names_sizes_and_times(tmp_path):
    made(tmp_path, "a.jsonl", "b.jsonl", "other.txt")
    os.utime(tmp_path / "a.jsonl", (1, 1))
    seen = [find(str(tmp_path)).fingerprint]
    assert find(str(tmp_path)).fingerprint == seen[0]
    assert find(str(tmp_path / "*.jsonl")).fingerprint == seen[0]

    os.utime(tmp_path / "a.jsonl", (2, 2))
    seen.append(find(str(tmp_path)).fingerprint)
    (tmp_path / "a.jsonl").write_bytes(LINE * 2)
    os.utime(tmp_path / "a.jsonl", (2, 2))
    seen.append(find(str(tmp_path)).fingerprint)
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    seen.append(find(str(tmp_path)).fingerprint)
    made(tmp_path, "d.jsonl")
    seen.append(find(str(tmp_path)).fingerprint)
    assert len(set(seen)) == 5

    # What is not read does not matter.
    made(tmp_path, "more.txt", ".d.jsonl")
    assert find(str(tmp_path)).fingerprint == seen[-1]


@given(
    text=st.lists(st.sampled_from([b"\n", b"\r", b"a", b"\0", b"\xff", b" "])).map(b"".join),
    num_bytes=st.integers(1, 9),
)
def test_lines_are_those_of_the_whole_text_whatever_the_pieces(text, num_bytes):
    expected = text.split(b"\n")
    if not expected[-1]:
        # What ends with a newline has no line after it.
        expected.pop()
    assert list(whole_lines(pa.BufferReader(text), "x.jsonl", num_bytes)) == expected


@pytest.mark.parametrize(("text", "expected"), [(b"", []), (b"a", [b"a"]), (b"\n", [b""])])
def test_lines_of_the_shortest_texts(text, expected):
    assert list(whole_lines(pa.BufferReader(text), "x.jsonl")) == expected


def test_a_line_may_be_longer_than_a_piece_of_the_file():
    text = b"a" * (2**20 + 1) + b"\n" + b"b" * 2**20
    assert [len(line) for line in whole_lines(pa.BufferReader(text), "x.jsonl")] == [
        2**20 + 1,
        2**20,
    ]


def blocks_of(text, path="bucket/folder/f.jsonl.gz"):
    """What Ray Data would read of a file; its own constructor would start Ray."""
    source = object.__new__(JsonLines)
    return list(source._read_stream(pa.BufferReader(text), path))


def test_each_line_knows_where_it_stands_across_blank_ones():
    (block,) = blocks_of(b'\n{"a": 1}\r\n\n \t\n[\xff\n\r\nlast')
    assert block.to_pydict() == {
        "text": [b'{"a": 1}\r', b"[\xff", b"last"],
        "place": ["f.jsonl.gz:2", "f.jsonl.gz:5", "f.jsonl.gz:7"],
    }
    assert block.schema.types == [pa.binary(), pa.string()]


@pytest.mark.parametrize("text", [b"", b"\n", b" \n\r\n\n"])
def test_a_file_of_nothing_has_no_blocks(text):
    assert blocks_of(text) == []


@pytest.mark.parametrize("num_lines", [ROWS_PER_BLOCK, ROWS_PER_BLOCK + 1, 2 * ROWS_PER_BLOCK])
def test_a_long_file_comes_in_blocks(num_lines):
    lines = [json.dumps({"example_id": n}).encode() for n in range(num_lines)]
    # A blank line after each seventh: they count, but take no room.
    text = b"".join(line + b"\n" * (2 if n % 7 == 6 else 1) for n, line in enumerate(lines))
    blocks = blocks_of(text)
    whole, rest = divmod(num_lines, ROWS_PER_BLOCK)
    assert [block.num_rows for block in blocks] == [ROWS_PER_BLOCK] * whole + [rest][: rest > 0]
    table = pa.concat_tables(blocks)
    assert table.column("text").to_pylist() == lines
    places = [f"f.jsonl.gz:{n + n // 7 + 1}" for n in range(num_lines)]
    assert table.column("place").to_pylist() == places


def test_columns_of_a_parquet_file_are_its_outermost(tmp_path):
    table = pa.table({"messages": [[{"role": "user", "content": "w1"}]], "source": ["tutor"]})
    pq.write_table(table, tmp_path / "a.parquet")
    files = find(str(tmp_path))
    assert parquet_columns(files.system, files.paths[0]) == ["messages", "source"]


@pytest.mark.parametrize("content", [b"", b"PAR1", LINE * 9, b"PAR1" + b"\0" * 64 + b"PAR1"])
def test_a_file_that_is_not_parquet_is_refused(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    files = find(str(tmp_path))
    with pytest.raises(ConfigError) as refusal:
        parquet_columns(files.system, files.paths[0])
    said = f"corpus.path: {tmp_path}/a.parquet cannot be read as Parquet: "
    assert str(refusal.value).startswith(said)


def test_a_parquet_file_that_is_gone_is_refused(tmp_path):
    files = find(str(made(tmp_path, "a.parquet")))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ConfigError, match=r"a\.parquet cannot be read as Parquet: "):
        parquet_columns(files.system, files.paths[0])


def test_hidden_folders_are_left_out_unless_they_are_named(tmp_path):
    for folder in (".cache", "_tmp", "good"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text("{}")
    assert [path.split("/")[-2] for path in find(str(tmp_path)).paths] == ["good"]
    assert [path.split("/")[-2] for path in find(str(tmp_path / "*" / "*.jsonl")).paths] == ["good"]
    assert len(find(str(tmp_path / ".cache")).paths) == 1
    assert len(find(str(tmp_path / "_tmp" / "x.jsonl")).paths) == 1


def test_a_name_with_a_bracket_is_a_file_where_there_is_one(tmp_path):
    (tmp_path / "a[1].jsonl").write_text("{}")
    assert find(str(tmp_path / "a[1].jsonl")).paths == (str(tmp_path / "a[1].jsonl"),)
