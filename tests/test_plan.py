"""`--plan`: the table, from configurations alone, and its refusals."""

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
SHAPES = {"0.6B": (1024, 3072, 28, 16, True), "8B": (4096, 12288, 36, 32, False), "32B": (5120, 25600, 64, 64, False)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    """Writes a folder with nothing but the configuration of a Qwen3."""

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


def run_plan(capsys, *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return exit_info.value.code, output.out + output.err


def options(student: Path, teacher: Path) -> list[object]:
    return ["--plan", "--model.path", student, "--behavior.teacher.path", teacher]


def test_many_nodes_fit_the_machines_of_the_cluster_files(model, capsys) -> None:
    arguments = ["pipeline", JOBS / "many-nodes.toml", *options(model("8B"), model("32B"))]
    code, output = run_plan(capsys, *arguments, "--placement.gpu_gib", 79)
    assert code == 0
    assert "model.path: 8.19 billion parameters" in output
    assert "behavior.teacher.path: 32.76 billion parameters" in output
    first_words = [line.split()[0] for line in output.splitlines() if line]
    stages = [w for w in first_words if w in ("sample", "score", "sft", "rl", "evaluate")]
    assert stages == ["sample", "score", "sft", "rl", "rl", "evaluate"]
    assert output.count("fits 79 GiB") == 6


def test_a_role_that_does_not_fit_is_refused(model, capsys) -> None:
    arguments = ["pipeline", JOBS / "many-nodes.toml", *options(model("8B"), model("32B"))]
    code, output = run_plan(capsys, *arguments, "--placement.gpu_gib", 39)
    assert code == 2
    expected = "placement.gpu_gib: expected at least 39.6 for engines of teacher of stage sample"
    assert expected in output and "got 39" in output
    assert "generator.tensor_parallel_size" in output
    code, output = run_plan(capsys, *arguments, "--placement.gpu_gib", 79, "--learner.num_workers", 1)
    assert code == 2
    assert "ranks of stage sft" in output
    assert "learner.num_workers" in output


ARMS = """
[[arms]]
name = "{name}"
cooperate = {{{keys}}}
"""


@pytest.fixture
def cooperating(model, capsys, tmp_path: Path):
    """Plans a job with arms of these settings: the lines of stage cooperate, and the GiB of its ranks and of those of
    sft."""
    student, teacher = model("8B"), model("32B")

    def plan_arms(*settings: str) -> tuple[list[str], float, float]:
        arms = [ARMS.format(name=f"arm{n}", keys=keys) for n, keys in enumerate(settings)]
        path = tmp_path / "job.toml"
        path.write_text((JOBS / "many-nodes.toml").read_text() + "".join(arms))
        code, output = run_plan(capsys, "pipeline", path, *options(student, teacher))
        assert code == 0, output
        lines = [line for line in output.splitlines() if line.startswith("cooperate")]
        sft = next(line for line in output.splitlines() if line.startswith("sft"))
        return lines, float(lines[0].split()[3]), float(sft.split()[3])

    return plan_arms


def test_ranks_of_cooperate_need_what_those_of_sft_do(cooperating) -> None:
    lines, gib, of_sft = cooperating("", 'method = "trapo"')
    assert [line.split()[1] for line in lines] == ["ranks", "engines"]
    assert gib == of_sft and "shadow" not in lines[0]


def test_bridge_keeps_a_shadow_unless_it_is_offloaded(cooperating) -> None:
    """On 16 ranks: 2 bytes of weights, 2 of gradients and 12 of states for each parameter, and one more gibibyte of
    buckets."""
    _, without, of_sft = cooperating('method = {type = "bridge", meta_objective = false}')
    assert of_sft < without < of_sft + 0.5
    sizes = {}
    for offload in ("none", "optimizer", "parameters"):
        keys = f'method = {{type = "bridge", shadow_offload = "{offload}"}}'
        lines, sizes[offload], _ = cooperating("", keys)
        assert "shadow" in lines[0]
    share = 8.19e9 / 16 / 2**30
    assert sizes["none"] - without == pytest.approx(16 * share + 0.93, abs=0.3)
    assert sizes["none"] - sizes["optimizer"] == pytest.approx(12 * share, abs=0.2)
    assert sizes["optimizer"] - sizes["parameters"] == pytest.approx(2 * share, abs=0.2)


def test_copies_of_frozen_elements_are_counted(cooperating) -> None:
    """On 16 ranks: two copies in float32 and a mask."""
    lines, gib, of_sft = cooperating('method = {type = "alternate", frozen_frac = 0.5}')
    assert "frozen 4.3" in lines[0]
    assert gib - of_sft == pytest.approx(9 * 8.19e9 / 16 / 2**30, abs=0.1)


def test_a_plan_without_rl_has_no_line_of_it(model, capsys, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    text = (JOBS / "many-nodes.toml").read_text()
    path.write_text(text[: text.index("[[arms]]")] + "[cooperate]\nmethod = 'bridge'\n")
    arguments = ["pipeline", path, *options(model("8B"), model("8B"))]
    code, output = run_plan(capsys, *arguments)
    assert code == 0 and "\ncooperate" in output and "\nrl " not in output
    code, output = run_plan(capsys, *arguments, "--placement.gpu_gib", 30)
    assert code == 2 and "ranks of stage cooperate" in output
    assert "cooperate.method.shadow_offload" in output


def test_a_model_without_configuration_is_named(model, capsys, tmp_path: Path) -> None:
    arguments = ["sft", JOBS / "one-node.toml", *options(tmp_path, model("8B"))]
    code, output = run_plan(capsys, *arguments)
    assert code == 2
    assert "model.path: expected a folder with config.json" in output
    assert f"got '{tmp_path}'" in output
