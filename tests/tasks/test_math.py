"""Mathematics with known answers: what is read from files, what is right, and why not."""

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


def judged(reference, text, extractor="boxed"):
    problem = Problem("math-1", "math", (), reference, "train")
    return Math("nowhere", extractor=extractor).grade(problem, text)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(task, split="train", seed=0):
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
def test_answers_and_what_each_extractor_makes_of_them(reference, text, boxed, last):
    grades = {name: judged(reference, text, name) for name in ("boxed", "last_number", "either")}
    right = {"boxed": boxed, "last_number": last, "either": boxed or last}
    for name, grade in grades.items():
        assert grade.correct == bool(right[name]), name
        assert grade.reward == float(right[name])
        assert bool(grade.note) != grade.correct
        assert grade.parts["boxed_correct"] == boxed
        assert grade.parts["last_number_correct"] == last
        assert grade.parts["extractors_disagree"] == float(boxed != last)


@pytest.mark.parametrize(
    ("text", "extractor", "answered", "note"),
    [
        ("it is 6", "boxed", 0.0, "boxed: no answer"),
        ("it is six", "last_number", 0.0, "last_number: no answer"),
        ("it is 6", "either", 1.0, "boxed: no answer; last_number: read '6', expected '5'"),
        (r"\boxed{6}", "boxed", 1.0, "boxed: read '6', expected '5'"),
        (r"\boxed{" + "7" * 500 + "}", "boxed", 1.0, "boxed: 500 characters; expected at most 400"),
    ],
)
def test_the_note_says_why_an_answer_earned_nothing(text, extractor, answered, note):
    grade = judged("5", text, extractor)
    assert (grade.note, grade.parts["answered"]) == (note, answered)


@settings(deadline=None, max_examples=25)
@given(st.text() | st.text(r"\boxed{}fac0123456789.,-/%^_ ").map(lambda t: f"\\boxed{{{t[:30]}}}"))
def test_no_text_raises(text):
    grade = judged("5", text)
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
def test_what_is_extracted(text, boxed, number):
    assert (last_boxed(text), last_number(text)) == (boxed, number)


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "jsonl.gz", "jsonl.zst", "parquet"])
def test_kinds_of_files(kind, tmp_path):
    path = tmp_path / f"problems.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        with pa.output_stream(str(path), compression="detect") as file:
            file.write("\n".join(map(json.dumps, ROWS)).encode())
    plain = Math(write(tmp_path / "plain.jsonl", ROWS))
    assert read(Math(str(path))) == read(plain) != []


def test_a_folder_is_all_its_files(tmp_path):
    for number in range(4):
        write(tmp_path / f"{number}.jsonl", ROWS[number::4])
    write(tmp_path / "_notes.jsonl", [{"problem": "hidden", "answer": 1}])
    (tmp_path / "README.md").write_text("not rows")
    task = Math(str(tmp_path))
    found = [p.messages[0]["content"] for s in ("train", "heldout") for p in read(task, s)]
    assert sorted(found) == sorted(row["problem"] for row in ROWS)


def test_problems_are_distinct_in_an_order_of_the_seed_and_split_by_hash(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS + ROWS[:7])
    task = Math(path, label="sums", heldout_fraction=0.3)
    splits = {split: read(task, split) for split in ("train", "heldout")}
    ids = [problem.problem_id for problems in splits.values() for problem in problems]
    assert len(ids) == len(set(ids)) == len(ROWS)
    assert all(problem_id.startswith("sums-") for problem_id in ids)
    assert 4 <= len(splits["heldout"]) <= 20
    assert all(p.split == split and p.task == "sums" for split in splits for p in splits[split])
    assert read(task) == read(Math(path, label="sums", heldout_fraction=0.3))
    assert read(task, seed=1) != read(task) and {p.problem_id for p in read(task)} == {
        p.problem_id for p in read(task, seed=1)
    }


def test_columns_and_prompts_as_asked(tmp_path):
    rows = [
        {"question": " 1 + 1? ", "gold": r"We add: \boxed{\frac{4}{2}}.", "part": "train"},
        {"question": "2 + 2?", "gold": 4.0, "part": "heldout"},
        {"question": "1 + 1?", "gold": "3", "part": "train"},
        {"question": "3 + 3?", "gold": 6, "part": "train"},
        {"question": "3 + 3?", "gold": 6, "part": "heldout"},
    ]
    task = Math(
        write(tmp_path / "a.jsonl", rows),
        problem="question",
        answer="gold",
        split="part",
        system="Be brief.",
        instruction=r"Put the answer in \boxed{}.",
    )
    (problem,) = read(task)
    assert problem.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?\n\nPut the answer in \\boxed{}."},
    )
    assert problem.reference == r"\frac{4}{2}" and task.grade(problem, r"\boxed{2}").correct
    assert sorted(p.reference for p in read(task, "heldout")) == ["4.0", "6"]


def test_judges_need_no_files():
    spec = TaskSpec(name="math", options={"path": "/nowhere/a.jsonl"})
    (grade,) = make_graders([spec])
    problem = Problem("math-1", "math", (), "5", "train")
    assert grade.grade(problem, r"\boxed{5}").correct
    with pytest.raises(ConfigError) as refusal:
        make_tasks([spec])
    assert str(refusal.value) == (
        "tasks.0.options: path: read '/nowhere/a.jsonl', which is not there; expected a file or"
        " folder"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extractor": "all"}, "extractor: read 'all', expected one of boxed, last_number, either"),
        ({"heldout_fraction": 0}, "heldout_fraction: read 0, expected 0 to 1 exclusive"),
        ({"heldout_fraction": 1.0}, "heldout_fraction: read 1.0, expected 0 to 1 exclusive"),
        ({"color": 3}, "Math.__init__() got an unexpected keyword argument 'color'"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path):
    options = {"path": write(tmp_path / "a.jsonl", ROWS), **options}
    with pytest.raises(ConfigError) as refusal:
        make_tasks([TaskSpec(name="math", options=options)])
    assert str(refusal.value) == f"tasks.0.options: read {options}; {message}"


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", "{", {}, "{file}:1: is not JSON: Expecting property name enclosed in double"),
        ("a.jsonl", "\n[1]", {}, "{file}:2: read list, expected an object"),
        ("a.jsonl", '{"problem": "a"}', {}, "{file}:1: has ['problem']; expected also ['answer']"),
        (
            "a.jsonl",
            '{"problem": 3, "answer": 2}',
            {},
            "{file}:1, problem: read 3, expected text",
        ),
        (
            "a.jsonl",
            '{"problem": " ", "answer": 2}',
            {},
            "{file}:1, problem: read ' ', expected text",
        ),
        (
            "a.jsonl",
            '{"problem": "a", "answer": true}',
            {},
            "{file}:1, answer: read True, expected a number or text",
        ),
        (
            "a.jsonl",
            '{"problem": "a", "answer": ""}',
            {},
            "{file}:1, answer: read '', 0 characters; expected 1 to 400, or a text with a"
            " \\boxed{} of so many",
        ),
        (
            "a.jsonl",
            '{"problem": "a", "answer": 1, "split": "test"}',
            {"split": "split"},
            "{file}:1, split: read 'test', expected 'train' or 'heldout'",
        ),
        ("a.jsonl.gz", "plain", {}, "{file}: cannot be read: "),
        ("a.parquet", "plain", {}, "{file}: cannot be read: "),
        (
            "a.csv",
            "problem,answer",
            {},
            "path: read '{file}', which holds no file of a kind that can be read; expected .parquet"
            " or one of .jsonl, .jsonl.gz, .jsonl.zst, .ndjson, .ndjson.gz, .ndjson.zst, .json,"
            " .json.gz, .json.zst",
        ),
    ],
)
def test_bad_rows_are_named(name, content, options, message, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError) as refusal:
        read(Math(str(path), **options))
    assert str(refusal.value).startswith(message.replace("{file}", str(path)))


def test_a_cut_off_file_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ConfigError, match=f"^{path}: cannot be read: "):
        read(Math(str(path)))


def test_parquet_without_a_column_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"problem": "a", "solution": "b"}]), path)
    with pytest.raises(ConfigError) as refusal:
        read(Math(str(path)))
    assert str(refusal.value) == (
        f"{path}: has columns ['problem', 'solution']; expected also ['answer']"
    )


def test_a_split_that_there_is_not_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^split: read 'test', expected 'train' or 'heldout'$"):
        read(Math(write(tmp_path / "a.jsonl", ROWS)), "test")
