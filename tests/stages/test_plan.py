"""`--plan`: the table, from configurations alone, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pear_ray.__main__ import main

JOBS = Path(__file__).parents[2] / "jobs"
COMMON = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151_936,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960,
}  # fmt: skip
SHAPES = {
    "0.6B": (1024, 3072, 28, 16, True),
    "8B": (4096, 12288, 36, 32, False),
    "32B": (5120, 25600, 64, 64, False),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    """Makes a folder that holds nothing but the configuration of a Qwen3."""

    def make(name: str) -> Path:
        hidden, intermediate, layers, heads, is_tied = SHAPES[name]
        folder = tmp_path_factory.mktemp(name)
        own = {
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "tie_word_embeddings": is_tied,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(COMMON | own))
        return folder

    return make


def say(capsys, *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    told = capsys.readouterr()
    return ended.value.code, told.out + told.err


def of(student: Path, teacher: Path) -> list[object]:
    return ["--plan", "--model.path", student, "--behaviour.teacher.path", teacher]


def test_many_nodes_fit_the_machines_of_the_cluster_files(model, capsys) -> None:
    words = ["pipeline", JOBS / "many-nodes.toml", *of(model("8B"), model("32B"))]
    code, told = say(capsys, *words, "--placement.gpu_gib", 79)
    assert code == 0
    assert "model.path: 8.19 billion parameters" in told
    assert "behaviour.teacher.path: 32.76 billion parameters" in told
    lines = [line.split()[:2] for line in told.splitlines()]
    stages = [
        words[0]
        for words in lines
        if words and words[0] in ("sample", "score", "sft", "rl", "evaluate")
    ]
    assert stages == ["sample", "score", "sft", "rl", "rl", "evaluate"]
    assert told.count("fits 79 GiB") == 6


def test_what_cannot_fit_is_refused(model, capsys) -> None:
    words = ["pipeline", JOBS / "many-nodes.toml", *of(model("8B"), model("32B"))]
    code, told = say(capsys, *words, "--placement.gpu_gib", 39)
    assert code == 2
    assert "placement.gpu_gib: read 39, but engines of teacher of stage sample needs" in told
    assert "generator.tensor_parallel" in told
    code, told = say(capsys, *words, "--placement.gpu_gib", 79, "--learner.num_workers", 1)
    assert code == 2
    assert "but ranks of stage sft needs" in told
    assert "learner.num_workers" in told


def test_a_model_without_configuration_is_named(model, capsys, tmp_path: Path) -> None:
    words = ["sft", JOBS / "one-node.toml", *of(tmp_path, model("8B"))]
    code, told = say(capsys, *words)
    assert code == 2
    assert "model.path: read" in told
    assert "config.json" in told
