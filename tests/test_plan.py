"""`--plan`: the table, from configurations alone, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pear_ray.__main__ import main

JOBS = Path(__file__).parents[1] / "jobs"
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
    return ["--plan", "--model.path", student, "--behavior.teacher.path", teacher]


def test_many_nodes_fit_the_machines_of_the_cluster_files(model, capsys) -> None:
    words = ["pipeline", JOBS / "many-nodes.toml", *of(model("8B"), model("32B"))]
    code, told = say(capsys, *words, "--placement.gpu_gib", 79)
    assert code == 0
    assert "model.path: 8.19 billion parameters" in told
    assert "behavior.teacher.path: 32.76 billion parameters" in told
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
    assert "generator.tensor_parallel_size" in told
    code, told = say(capsys, *words, "--placement.gpu_gib", 79, "--learner.num_workers", 1)
    assert code == 2
    assert "but ranks of stage sft needs" in told
    assert "learner.num_workers" in told


ARMS = """
[[arms]]
name = "{name}"
cooperate = {{{keys}}}
"""


@pytest.fixture
def cooperating(model, capsys, tmp_path: Path):
    """The lines of stage cooperate in the plan of a job with arms of such settings, and GiB of its
    ranks and of those of sft."""
    student, teacher = model("8B"), model("32B")

    def lines(*settings: str) -> tuple[list[str], float, float]:
        arms = [ARMS.format(name=f"arm{n}", keys=keys) for n, keys in enumerate(settings)]
        path = tmp_path / "job.toml"
        path.write_text((JOBS / "many-nodes.toml").read_text() + "".join(arms))
        code, told = say(capsys, "pipeline", path, *of(student, teacher))
        assert code == 0, told
        both = [line for line in told.splitlines() if line.startswith("cooperate")]
        sft = next(line for line in told.splitlines() if line.startswith("sft"))
        return both, float(both[0].split()[3]), float(sft.split()[3])

    return lines


def test_ranks_of_cooperate_hold_what_those_of_sft_do(cooperating) -> None:
    both, gib, of_sft = cooperating("", 'method = "trapo"')
    assert [line.split()[1] for line in both] == ["ranks", "engines"]
    assert gib == of_sft and "shadow" not in both[0]


def test_bridge_holds_a_shadow_where_it_is_not_offloaded(cooperating) -> None:
    """On 16 ranks: 2 bytes of weights, 2 of gradients and 12 of states for each parameter, and one
    more gibibyte of buckets."""
    _, without, of_sft = cooperating('method = "bridge", meta_objective = false')
    assert of_sft < without < of_sft + 0.5
    sizes = {}
    for left_over in ("none", "optimizer", "parameters"):
        keys = f'method = "bridge", shadow_offload = "{left_over}"'
        both, sizes[left_over], _ = cooperating("", keys)
        assert "shadow" in both[0]
    share = 8.19e9 / 16 / 2**30
    assert sizes["none"] - without == pytest.approx(16 * share + 0.93, abs=0.3)
    assert sizes["none"] - sizes["optimizer"] == pytest.approx(12 * share, abs=0.2)
    assert sizes["optimizer"] - sizes["parameters"] == pytest.approx(2 * share, abs=0.2)


def test_what_mifo_holds_still_is_counted(cooperating) -> None:
    """On 16 ranks: two copies in float32 and a mask."""
    both, gib, of_sft = cooperating('method = "alternate", frozen_frac = 0.5')
    assert "held 4.3" in both[0]
    assert gib - of_sft == pytest.approx(9 * 8.19e9 / 16 / 2**30, abs=0.1)


def test_a_plan_without_rl_names_none(model, capsys, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    text = (JOBS / "many-nodes.toml").read_text()
    path.write_text(text[: text.index("[[arms]]")] + "[cooperate]\nmethod = 'bridge'\n")
    words = ["pipeline", path, *of(model("8B"), model("8B"))]
    code, told = say(capsys, *words)
    assert code == 0 and "\ncooperate" in told and "\nrl " not in told
    code, told = say(capsys, *words, "--placement.gpu_gib", 30)
    assert code == 2 and "ranks of stage cooperate needs" in told
    assert "cooperate.shadow_offload" in told


def test_a_model_without_configuration_is_named(model, capsys, tmp_path: Path) -> None:
    words = ["sft", JOBS / "one-node.toml", *of(tmp_path, model("8B"))]
    code, told = say(capsys, *words)
    assert code == 2
    assert "model.path: read" in told
    assert "config.json" in told
