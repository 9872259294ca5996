"""Math: grades of answers, problems read from files, and invalid files."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.config import TaskSpec
from pear_ray.errors import ConfigError
from pear_ray.records import Problem
from pear_ray.tasks import make_graders, make_tasks
from pear_ray.tasks.math import Math, last_boxed, last_number

ROWS = [{"problem": f"What is {n} + {n}?", "answer": 2 * n} for n in range(40)]


def graded(reference, text, extractor="boxed"):
    problem = Problem("math-1", "math", (), reference, "train")
    return Math("nowhere", extractor=extractor).grade(problem, text)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problems_of(task, split="train", seed=0):
    return list(task.problems(split, seed))


@pytest.mark.parametrize(
    ("reference", "text", "boxed", "last"),
    [
        ("42", r"So it is \boxed{42}.", 1, 1),
        ("42", "So it is 42.", 0, 1),
        ("42", r"\boxed{42} because 6 * 7", 1, 0),
        ("42", r"\boxed{41}, no, \boxed{42}", 1, 1),
        ("42", r"\boxed{42}, no, \boxed{41}", 0, 0),
        ("42", r"\boxed{42.0}", 1, 1),
        ("42", r"\boxed{42\text{ cm}}", 1, 1),
        ("42", r"\boxed{\$42}", 1, 1),
        ("-3", r"\boxed{-3}", 1, 1),
        ("3", r"\boxed{-3}", 0, 0),
        ("1/2", r"\boxed{\frac{1}{2}}", 1, 1),
        ("1/2", r"\boxed{0.5}", 1, 1),
        (r"\dfrac{3}{4}", "It is 3/4.", 0, 1),
        ("1/3", r"\boxed{0.33}", 0, 0),
        ("50%", r"\boxed{50\%}", 1, 1),
        ("0.5", r"that is \boxed{50\%}", 1, 1),
        ("1234", "1,234 in all", 0, 1),
        ("1,234", r"\boxed{1234}", 1, 1),
        ("(1, 2]", r"\boxed{(1,2]}", 1, 0),
        ("(1, 2]", r"\boxed{[1,2]}", 0, 0),
        (r"[0,1)\cup(2,3]", r"\boxed{[0, 1) \cup (2, 3]}", 1, 0),
        (r"\{1, 2\}", r"\boxed{\{2,1\}}", 1, 0),
        (r"2\sqrt{2}", r"\boxed{\sqrt{8}}", 1, 0),
        ("x^2 + 1", r"\boxed{1 + x^2}", 1, 0),
        ("5", r"\boxed{x = 5}", 1, 1),
        ("5", r"\boxed{\boxed{5}}", 1, 1),
        ("5", r"\boxed{x = \boxed{5}}", 1, 1),
        ("5", r"\boxed{5} and so \boxed{6", 1, 0),
        ("5", r"\boxed{5.}", 1, 1),
        ("5", r"\boxed{}", 0, 0),
        ("5", "", 0, 0),
        ("5", "I do not know.", 0, 0),
        ("5", r"\boxed{}{}} \frac{ } \boxed{\frac{1}{0}} \left(", 0, 0),
        ("5", r"\boxed{" * 20_000, 0, 0),
        ("5", r"\boxed{" + "9" * 100_000 + "}", 0, 0),
        ("5", "word " * 200_000 + r"\boxed{5}", 1, 1),
        ("B", r"\boxed{\text{(B)}}", 1, 0),
        ("B", r"\boxed{C}", 0, 0),
    ],
)
def test_grade_by_extractor(reference, text, boxed, last):
    grades = {name: graded(reference, text, name) for name in ("boxed", "last_number", "either")}
    expected = {"boxed": boxed, "last_number": last, "either": boxed or last}
    for name, grade in grades.items():
        assert grade.correct == bool(expected[name]), name
        assert grade.reward == float(expected[name])
        assert bool(grade.note) != grade.correct
        assert grade.parts["boxed_correct"] == boxed
        assert grade.parts["last_number_correct"] == last
        assert grade.parts["extractors_disagree"] == float(boxed != last)


@pytest.mark.parametrize(
    ("text", "extractor", "answered", "note"),
    [
        ("it is 6", "boxed", 0.0, "boxed: no answer"),
        ("it is six", "last_number", 0.0, "last_number: no answer"),
        ("it is 6", "either", 1.0, "boxed: no answer; last_number: expected '5', got '6'"),
        (r"\boxed{6}", "boxed", 1.0, "boxed: expected '5', got '6'"),
        (r"\boxed{" + "7" * 500 + "}", "boxed", 1.0, "boxed: expected at most 400 characters, got 500"),
    ],
)
def test_the_note_names_the_fault(text, extractor, answered, note):
    grade = graded("5", text, extractor)
    assert (grade.note, grade.parts["answered"]) == (note, answered)


@settings(deadline=None, max_examples=25)
@given(st.text() | st.text(r"\boxed{}fac0123456789.,-/%^_ ").map(lambda t: f"\\boxed{{{t[:30]}}}"))
def test_grading_never_raises(text):
    grade = graded("5", text)
    assert grade.reward == float(grade.correct) and len(grade.parts) == 4


@pytest.mark.parametrize(
    ("text", "boxed", "number"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"} { \boxed{ 7 }", "7", "7"),
        (r"\boxed{\{1\}", None, "1"),
        (r"\fbox{3}", None, "3"),
        ("10-3", None, "3"),
        ("x = -3", None, "-3"),
        ("12.5%, or 1/8", None, "1/8"),
        ("$1,234.5.", None, "1,234.5"),
        ("12,34", None, "34"),
        (".5", None, ".5"),
        ("three", None, None),
    ],
)
def test_last_boxed_and_last_number(text, boxed, number):
    assert (last_boxed(text), last_number(text)) == (boxed, number)


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "jsonl.gz", "jsonl.zst", "parquet"])
def test_file_formats(suffix, tmp_path):
    path = tmp_path / f"problems.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        with pa.output_stream(str(path), compression="detect") as file:
            file.write("\n".join(map(json.dumps, ROWS)).encode())
    plain = Math(write_rows(tmp_path / "plain.jsonl", ROWS))
    assert problems_of(Math(str(path))) == problems_of(plain) != []


def test_a_folder_is_read_as_one_file(tmp_path):
    for number in range(4):
        write_rows(tmp_path / f"{number}.jsonl", ROWS[number::4])
    write_rows(tmp_path / "_notes.jsonl", [{"problem": "hidden", "answer": 1}])
    (tmp_path / "README.md").write_text("not rows")
    task = Math(str(tmp_path))
    questions = [p.messages[0]["content"] for s in ("train", "heldout") for p in problems_of(task, s)]
    assert sorted(questions) == sorted(row["problem"] for row in ROWS)


def test_problems_are_distinct_split_by_hash_and_ordered_by_seed(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ROWS + ROWS[:7])
    task = Math(path, label="sums", heldout_fraction=0.3)
    splits = {split: problems_of(task, split) for split in ("train", "heldout")}
    ids = [problem.problem_id for problems in splits.values() for problem in problems]
    assert len(ids) == len(set(ids)) == len(ROWS)
    assert all(problem_id.startswith("sums-") for problem_id in ids)
    assert 4 <= len(splits["heldout"]) <= 20
    assert all(p.split == split and p.task == "sums" for split in splits for p in splits[split])
    assert problems_of(task) == problems_of(Math(path, label="sums", heldout_fraction=0.3))
    assert problems_of(task, seed=1) != problems_of(task) and {p.problem_id for p in problems_of(task)} == {
        p.problem_id for p in problems_of(task, seed=1)
    }


def test_column_and_prompt_options(tmp_path):
    rows = [
        {"question": " 1 + 1? ", "gold": r"We add: \boxed{\frac{4}{2}}.", "part": "train"},
        {"question": "2 + 2?", "gold": 4.0, "part": "heldout"},
        {"question": "1 + 1?", "gold": "3", "part": "train"},
        {"question": "3 + 3?", "gold": 6, "part": "train"},
        {"question": "3 + 3?", "gold": 6, "part": "heldout"},
    ]
    task = Math(
        write_rows(tmp_path / "a.jsonl", rows),
        problem="question",
        answer="gold",
        split="part",
        system="Be brief.",
        instruction=r"Put the answer in \boxed{}.",
    )
    (problem,) = problems_of(task)
    assert problem.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?\n\nPut the answer in \\boxed{}."},
    )
    assert problem.reference == r"\frac{4}{2}" and task.grade(problem, r"\boxed{2}").correct
    assert sorted(p.reference for p in problems_of(task, "heldout")) == ["4.0", "6"]


def test_grading_needs_no_files():
    spec = TaskSpec(name="math", options={"path": "/nowhere/a.jsonl"})
    (grader,) = make_graders([spec])
    problem = Problem("math-1", "math", (), "5", "train")
    assert grader.grade(problem, r"\boxed{5}").correct
    with pytest.raises(ConfigError) as refusal:
        make_tasks([spec])
    assert str(refusal.value) == (
        "tasks.0.options: path: expected a file or folder, got '/nowhere/a.jsonl', which does not exist"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extractor": "all"}, "extractor: expected one of boxed, last_number, either, got 'all'"),
        ({"heldout_fraction": 0}, "heldout_fraction: expected a number in (0, 1), got 0"),
        ({"heldout_fraction": 1.0}, "heldout_fraction: expected a number in (0, 1), got 1.0"),
        ({"color": 3}, "Math.__init__() got an unexpected keyword argument 'color'"),
    ],
)
def test_invalid_options_are_refused(options, message, tmp_path):
    options = {"path": write_rows(tmp_path / "a.jsonl", ROWS), **options}
    with pytest.raises(ConfigError) as refusal:
        make_tasks([TaskSpec(name="math", options=options)])
    assert str(refusal.value) == f"tasks.0.options: {message}"


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", "{", {}, "{file}:1: expected JSON: "),
        ("a.jsonl", "\n[1]", {}, "{file}:2: expected an object, got list"),
        ("a.jsonl", '{"problem": "a"}', {}, "{file}:1: expected columns ['answer'], got ['problem']"),
        ("a.jsonl", '{"problem": 3, "answer": 2}', {}, "{file}:1, problem: expected text, got 3"),
        ("a.jsonl", '{"problem": " ", "answer": 2}', {}, "{file}:1, problem: expected text, got ' '"),
        ("a.jsonl", '{"problem": "a", "answer": true}', {}, "{file}:1, answer: expected a number or text, got True"),
        (
            "a.jsonl",
            '{"problem": "a", "answer": ""}',
            {},
            "{file}:1, answer: expected 1 to 400 characters, in all or in a \\boxed{}, got 0: ''",
        ),
        (
            "a.jsonl",
            '{"problem": "a", "answer": 1, "split": "test"}',
            {"split": "split"},
            "{file}:1, split: expected 'train' or 'heldout', got 'test'",
        ),
        ("a.jsonl.gz", "plain", {}, "{file}: cannot be read: "),
        ("a.parquet", "plain", {}, "{file}: cannot be read: "),
        (
            "a.csv",
            "problem,answer",
            {},
            "path: expected a file or folder with .parquet, .jsonl, .jsonl.gz, .jsonl.zst, .ndjson,"
            " .ndjson.gz, .ndjson.zst, .json, .json.gz, .json.zst, got '{file}'",
        ),
    ],
)
def test_invalid_rows_are_refused(name, content, options, message, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError) as refusal:
        problems_of(Math(str(path), **options))
    assert str(refusal.value).startswith(message.replace("{file}", str(path)))


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ConfigError, match=f"^{path}: cannot be read: "):
        problems_of(Math(str(path)))


def test_parquet_without_a_column_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"problem": "a", "solution": "b"}]), path)
    with pytest.raises(ConfigError) as refusal:
        problems_of(Math(str(path)))
    assert str(refusal.value) == (f"{path}: expected columns ['answer'], got ['problem', 'solution']")


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^split: expected 'train' or 'heldout', got 'test'$"):
        problems_of(Math(write_rows(tmp_path / "a.jsonl", ROWS)), "test")
