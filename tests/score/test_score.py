"""Stage `score` on real Ray Data and vLLM, against transformers; and corpora that it rejects."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pear_ray.__main__ import run_command
from pear_ray.config import Job, Pretrain
from pear_ray.errors import ConfigError
from pear_ray.records import SCORED_SCHEMA
from pear_ray.score.scorer import group_by_architecture
from pear_ray.train.new_model import write_new_model


@pytest.fixture(scope="session")
def scored(scored_run: Path) -> list[dict[str, Any]]:
    """The scored rows in the order of the files."""
    files = sorted((scored_run / "scored").glob("*.parquet"))
    tables = [pq.read_table(file) for file in files]
    assert all(table.schema.names == SCORED_SCHEMA.names for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def test_rows_are_scored_once_and_sorted_by_id(corpus: Any, scored: list[dict[str, Any]]) -> None:
    assert [row["example_id"] for row in scored] == sorted(corpus.rows)


def test_rejected_rows_have_a_reason(corpus: Any, scored_run: Path) -> None:
    lines = (scored_run / "scored" / "rejected.jsonl").read_text().splitlines()
    rejected = [json.loads(line) for line in lines]
    repeated = next(iter(corpus.rows))
    assert [row["example_id"] for row in rejected] == sorted([*corpus.bad, repeated])
    reasons = {row["example_id"]: row["reason"] for row in rejected}
    for name, reason in {**corpus.bad, repeated: "example_id"}.items():
        assert reasons[name].startswith(reason) and "expected" in reasons[name]


def test_logprobs_match_transformers(corpus: Any, scored: list[dict[str, Any]], by_transformers: Any) -> None:
    """Including multi-turn rows, rows that fill the context, chunked prefill and top-k."""
    for source, model in {**corpus.models, "?": corpus.models["b"]}.items():
        rows = [row for row in scored if row["source"] == source]
        assert {row["behavior_model"] for row in rows} == {model}
        ids = [(row["prompt_ids"], row["response_ids"]) for row in rows]
        for row, table in zip(rows, by_transformers(model, ids), strict=True):
            trainable = np.array(row["trainable"] or [True] * len(row["response_ids"]))
            own = table[range(len(table)), row["response_ids"]].numpy()
            found = np.array(row["behavior_logprobs"], dtype=np.float32)
            assert np.abs(found - np.where(trainable, own, 0)).max() <= 1e-4
            if row["logprobs_from"] != "recorded":
                top_ids = np.array(row["top_ids"]).reshape(-1, corpus.num_top)
                top = np.array(row["top_logprobs"]).reshape(-1, corpus.num_top)
                assert np.abs(top - table.topk(corpus.num_top).values.numpy()).max() <= 1e-4
                theirs = np.take_along_axis(table.numpy(), top_ids, axis=1)
                assert np.abs(theirs - top).max() <= 1e-4


def test_truncated_rows_fill_the_context(corpus: Any, scored: list[dict[str, Any]]) -> None:
    cut = [row for row in scored if row["truncated"]]
    assert len(cut) == 15
    assert {len(row["prompt_ids"]) + len(row["response_ids"]) for row in cut} == {corpus.max_model_len}


def test_only_trainable_tokens_are_scored(corpus: Any, scored: list[dict[str, Any]]) -> None:
    several = [row for row in scored if row["trainable"] is not None]
    assert len(several) >= 100
    for row in several:
        trainable = np.array(row["trainable"])
        assert trainable[0] and not trainable.all()
        assert not np.array(row["behavior_logprobs"])[~trainable].any()
        assert (np.array(row["behavior_logprobs"])[trainable] < 0).all()


def test_origin_of_logprobs_is_recorded(scored: list[dict[str, Any]]) -> None:
    origins = Counter((row["source"], row["logprobs_from"]) for row in scored)
    assert origins["a", "behavior"] == origins["b", "behavior"] == 150
    assert origins["?", "reference"] == 150
    # Of rows with recorded log-probs only the probe is scored, and compared.
    assert origins["c", "recorded"] + origins["c", "behavior"] == 150
    assert 30 <= origins["c", "behavior"] <= 90
    compared = [row["recorded_gap"] for row in scored if row["recorded_gap"] is not None]
    assert len(compared) == origins["c", "behavior"] and max(compared) <= 1e-4


def test_each_prompt_has_one_split(scored: list[dict[str, Any]]) -> None:
    splits: dict[tuple[int, ...], set[str]] = {}
    for row in scored:
        splits.setdefault(tuple(row["prompt_ids"]), set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert 60 <= sum(row["split"] == "heldout" for row in scored) <= 180


def test_trainer_matches_engine_on_the_probe(scored_run: Path) -> None:
    """Behavior model a is the student: the gap is pure noise."""
    facts = json.loads((scored_run / "manifest.json").read_text())["stages"]["score"]["facts"]
    assert facts["rows"] == 604 and facts["rejected"] == 4
    for source in "abc":
        calibration = facts["calibration"][source]
        assert calibration["rows"] >= 30
        assert abs(calibration["bias"]) <= 1e-6 and calibration["spread"] <= 1e-5
        assert 0 < calibration["max_gap"] <= 1e-4


def test_progress_is_logged(scored_run: Path) -> None:
    last = json.loads((scored_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == last["parts"] and last["rejected_rows"] == 4
    assert last["tokens_per_second"] > last["rows_per_second"] > 0 and last["seconds_left"] == 0


def test_no_other_files_are_left(scored_run: Path) -> None:
    assert not list(scored_run.glob("*.partial"))
    names = {path.name for path in (scored_run / "scored").iterdir()}
    rows = {name for name in names if name.startswith("part-") and name.endswith(".parquet")}
    assert names - rows == {"rejected.jsonl", "facts.json", "made_from.json"} and rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "student"
    words = [str(n) for n in range(50)] + ["+", "=", "no"]
    write_new_model(folder, Pretrain(styles={}, hidden_size=64, num_heads=1), words)
    return str(folder)


def example(**changes: Any) -> dict[str, Any]:
    row = {
        "example_id": "a-1",
        "source": "teacher",
        "messages": [{"role": "user", "content": "1 + 2 ="}, {"role": "assistant", "content": "3"}],
    }
    return row | changes


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


USER_ONLY = [{"role": "user", "content": "1 + 2 ="}]
NAMELESS = {key: value for key, value in example().items() if key != "source"}
# Name of the mistake: (file, its bytes, parts of the message).
BAD_CORPORA = {
    "empty": ("corpus.jsonl", b"", ["corpus.path: expected at least one row"]),
    "no assistant": (
        "corpus.jsonl",
        lines(example(messages=USER_ONLY)),
        ["a-1", "messages", "['user']", "'assistant'"],
    ),
    "no source": (
        "corpus.jsonl",
        lines(NAMELESS),
        ["a-1", "source: expected", "['teacher']", "got None", "corpus.source"],
    ),
    "truncated": ("corpus.jsonl.gz", gzip.compress(lines(example()))[:-20], ["cannot be read"]),
    "no Parquet": ("corpus.parquet", lines(example()), ["corpus.parquet", "as Parquet"]),
}


@pytest.mark.parametrize("case", BAD_CORPORA)
def test_unusable_corpus_is_rejected(case: str, model: str, tmp_path: Path, ray_session: None) -> None:
    name, content, parts = BAD_CORPORA[case]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "job.toml").write_text(
        f"""
        [run]
        dir = "{tmp_path}/run"
        [model]
        path = "{model}"
        dtype = "float32"
        [behavior.teacher]
        path = "{model}"
        [corpus]
        path = "{tmp_path}/{name}"
        [generator]
        num_cpus = 0.5
        max_new_tokens = 8
        max_model_len = 64
        [[tasks]]
        name = "countdown"
        """
    )
    with pytest.raises(ConfigError) as error:
        run_command(["score", str(tmp_path / "job.toml")])
    for part in [*parts, str(tmp_path)]:
        assert part in str(error.value)
    assert not (tmp_path / "run" / "scored").exists()
    assert not list((tmp_path / "run").glob("*.partial"))
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"] == {}


def test_models_are_grouped_by_architecture(tiny_model) -> None:
    paths = {"a": str(tiny_model(True, 0)), "b": str(tiny_model(False, 0)), "c": str(tiny_model(True, 1))}
    job = Job.model_validate(
        {
            "run": {"dir": "run"},
            "model": {"path": paths["a"]},
            "behavior": {source: {"path": path} for source, path in paths.items()},
            "generator": {"max_new_tokens": 8, "max_model_len": 64},
            "tasks": [{"name": "countdown"}],
        }
    )
    assert group_by_architecture(job) == [{"a": paths["a"], "c": paths["c"]}, {"b": paths["b"]}]
