"""Corpora that cannot be used are refused in words, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pear_ray.__main__ import command
from pear_ray.config import BadInput, Job, Pretrain
from pear_ray.engines.model import write_new_model
from pear_ray.stages.score import sharing_engines


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
        "messages": [
            {"role": "user", "content": "1 + 2 ="},
            {"role": "assistant", "content": "3"},
        ],
    }
    return row | changes


USER_ONLY = [{"role": "user", "content": "1 + 2 ="}]
BAD_CORPORA = {
    "empty": ([], ["holds no", "expected"]),
    "no assistant": ([example(messages=USER_ONLY)], ["a-1", "messages", "['user']", "'assistant'"]),
    "no source column": ([{k: v for k, v in example().items() if k != "source"}], ["['source']"]),
}


@pytest.mark.parametrize("case", BAD_CORPORA)
def test_unusable_corpus(case: str, model: str, tmp_path: Path, ray_session: None) -> None:
    corpus, words = BAD_CORPORA[case]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (tmp_path / "job.toml").write_text(
        f"""
        [run]
        dir = "{tmp_path}/run"
        [model]
        path = "{model}"
        dtype = "float32"
        [behaviour.teacher]
        path = "{model}"
        [corpus]
        path = "{tmp_path}/corpus.jsonl"
        [generator]
        num_cpus = 0.5
        max_new_tokens = 8
        max_model_len = 64
        [[tasks]]
        name = "countdown"
        """
    )
    with pytest.raises(BadInput) as refusal:
        command(["score", str(tmp_path / "job.toml")])
    for word in [*words, str(tmp_path)]:
        assert word in str(refusal.value)
    assert not (tmp_path / "run" / "scored").exists()
    assert not list((tmp_path / "run").glob("*.partial"))
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"] == {}


def test_sources_share_an_engine_where_the_architecture_is_the_same(tiny_model) -> None:
    paths = {
        "a": str(tiny_model(True, 0)),
        "b": str(tiny_model(False, 0)),
        "c": str(tiny_model(True, 1)),
    }
    job = Job.model_validate(
        {
            "run": {"dir": "run"},
            "model": {"path": paths["a"]},
            "behaviour": {source: {"path": path} for source, path in paths.items()},
            "generator": {"max_new_tokens": 8, "max_model_len": 64},
            "tasks": [{"name": "countdown"}],
        }
    )
    assert sharing_engines(job) == [{"a": paths["a"], "c": paths["c"]}, {"b": paths["b"]}]
