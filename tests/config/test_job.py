"""A job: read from a file and a command line, resolved for an arm, explained key by key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from pear_ray.config import Job, read_job
from pear_ray.config.base import keys_at, sections_in
from pear_ray.config.reference import reference
from pear_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
JOB_FILES = sorted((ROOT / "jobs").glob("*.toml"))

DOCUMENT = {
    "run": {"dir": "runs/one"},
    "model": {"pretrain": {"styles": {"build": 1.0}}},
    "behavior": {"my-teacher_plain": {"path": "./teacher_plain"}},
    "corpus": {"sample": {"num_examples": {"my-teacher_plain": 3}}},
    "sft": {"learning_rate": 0.5, "level": "block"},
    "rl": {"group_size": 4, "loss": {"type": "gspo", "clip_ratio": [0.1, 0.2]}},
    "generator": {"max_new_tokens": 8, "max_model_len": 16},
    "tasks": [{"name": "countdown"}],
    "arms": [
        {"name": "plain", "sft": {"level": "none"}},
        {"name": "pear", "rl": {"group_size": 2, "advantage": "rloo"}},
    ],
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(DOCUMENT))
    return path


def refusal(path, words=()):
    with pytest.raises(ConfigError) as refused:
        read_job(path, words)
    return str(refused.value).splitlines()


@pytest.mark.parametrize("file", JOB_FILES, ids=lambda path: path.name)
def test_job_files_read_back_from_json(file, tmp_path):
    job = read_job(file)
    copy = tmp_path / "config.json"
    copy.write_text(job.model_dump_json(indent=2))
    assert read_job(copy) == job


def test_there_are_job_files():
    assert {"laptop.toml"} <= {path.name for path in JOB_FILES}


def test_every_key_is_explained():
    sections = [Job]
    for section in sections:
        inner = (s for f in section.model_fields.values() for s in sections_in(f.annotation))
        sections += [s for s in inner if s not in sections]
        # The docstring of its class explains a table.
        undocumented = [
            name
            for name, field in section.model_fields.items()
            if not field.description and name != "type" and field.annotation not in sections_in(field.annotation)
        ]
        assert not undocumented and section.__doc__, section


def test_the_reference_is_up_to_date():
    """If not: python -m pear_ray.config.reference > jobs/KEYS.md"""
    assert (ROOT / "jobs" / "KEYS.md").read_text() == reference() + "\n"


@pytest.mark.parametrize(
    "line",
    [
        "- [`[rl]`](#rl)",
        "## `[[tasks]]`",
        "### `[behavior.NAME.pretrain]`",
        '### `[sft.objective] type = "trsft"`',
        '| `level` | "none" \\| "token" \\| "block" \\| "sequence" | `"token"` | Level of',
        "| `dir` | string | **required** |",
        "| `min_engines` | integer > 0 | *derived* |",
        "| `betas` | [number ≥ 0 and < 1, number ≥ 0 and < 1] | `[0.9, 0.999]` |",
        '| `loss` | "ppo" \\| "gspo" \\| "cispo" \\| "nft" | `"ppo"` |',
        "| `sft` | table of any or false | `{}` |",
    ],
)
def test_the_reference_names_type_and_default(line):
    assert line in reference()


def test_a_job_is_frozen():
    job = Job(**DOCUMENT)
    with pytest.raises(ValidationError, match="frozen"):
        job.sft.level = "token"


def test_paths_of_models():
    job = Job(**DOCUMENT)
    assert job.model_path() == str(Path("runs/one/pretrain/base").absolute())
    assert job.model_path("my-teacher_plain") == "./teacher_plain"
    assert job.scored_folder == Path("runs/one/scored")


def test_an_arm_is_a_job_on_the_same_corpus():
    job = Job(**DOCUMENT)
    before = job.model_dump_json()
    plain, pear = (job.of_arm(arm) for arm in job.arms)
    assert job.model_dump_json() == before
    assert plain.folder == Path("runs/one/arms/plain") != pear.folder
    assert (plain.sft.level, pear.sft.level) == ("none", "block")
    assert plain.sft.learning_rate == pear.sft.learning_rate == 0.5
    assert (plain.rl.group_size, pear.rl.group_size) == (4, 2)
    assert (plain.rl.advantage, pear.rl.advantage) == ("grpo", "rloo")
    for own in (plain, pear):
        assert own.scored_folder == job.scored_folder.absolute()
        assert own.model_path() == job.model_path()
        assert own.arms == () and own.run.seed == job.run.seed
        assert (own.generator, own.tasks, own.learner) == (job.generator, job.tasks, job.learner)


@pytest.mark.parametrize(
    ("location", "names", "known"),
    [
        ((), [], "arms"),
        (("sft",), ["sft"], "clip_log_ratio"),
        (("model", "pretrain"), ["model", "pretrain"], "num_layers"),
        (("behavior", "path", "pretrain"), ["behavior", "path", "pretrain"], "styles"),
        (("tasks", 0), ["tasks", "0"], "options"),
        (("arms", 1, "sft", "dict[str,any]"), ["arms", "1", "sft"], None),
        (("rl", "loss", "ppo", "clip_ratio", 0), ["rl", "loss", "clip_ratio", "0"], None),
        (("cooperate", "method", "bridge"), ["cooperate", "method"], "refresh_steps"),
        (("cooperate", "method", "bridge", "lora"), ["cooperate", "method", "lora"], "rank"),
    ],
)
def test_keys_at_any_location(location, names, known):
    found, fields = keys_at(location, Job)
    assert found == names
    assert known in fields if known else not fields


def test_all_mistakes_are_reported_at_once(path):
    wrong = {**DOCUMENT, "sft": {"epochs": 0, "levle": 1}, "rl": {"steps": "many"}}
    path.write_text(json.dumps(wrong))
    lines = refusal(path, ["--rl.group-size", "1", "--model.dtype", "half"])
    assert [line.partition(", got")[0] for line in lines] == [
        "command line: model.dtype: expected 'float32' or 'bfloat16'",
        f"{path}: sft.epochs: expected greater than 0",
        f"{path}: sft.levle: unknown key",
        f"{path}: rl.steps: expected a valid integer",
        "command line: rl.group_size: expected greater than 1",
    ]


# Words of a command line, and the value that they give to a key of the job.
OVERRIDES = [
    (["--sft.level", "token"], "sft.level", "token"),
    (["--sft.level=token"], "sft.level", "token"),
    (["--rl.group-size", "16"], "rl.group_size", 16),
    (["--rl.group_size", "1_6"], "rl.group_size", 16),
    (["--rl.learning_rate", "1e-4"], "rl.learning_rate", 1e-4),
    (["--sft.clip-log-ratio", "-0.5", "0.5"], "sft.clip_log_ratio", [-0.5, 0.5]),
    (["--sft.clip-log-ratio", "[-0.5, 0.5]"], "sft.clip_log_ratio", [-0.5, 0.5]),
    (["--study.seeds", "7"], "study.seeds", [7]),
    (["--sft.sources", "a", "b"], "sft.sources", ["a", "b"]),
    (["--run.dir", "2026"], "run.dir", "2026"),
    (["--tracking.wandb_project", "1.0"], "tracking.wandb_project", "1.0"),
    (["--rl.record"], "rl.record", True),
    (["--rl.record", "true"], "rl.record", True),
    (["--generator.no-metrics"], "generator.metrics", False),
    (["--no-generator.metrics"], "generator.metrics", False),
    (["--generator.metrics", "false"], "generator.metrics", False),
    (["--rl.loss", "nft"], "rl.loss", {"type": "nft"}),
    (["--rl.loss", "cispo"], "rl.loss.clip_ratio", [1.0, 3.0]),
    (["--rl.loss.clip-ratio", "0.5", "1"], "rl.loss", {"type": "gspo", "clip_ratio": [0.5, 1.0]}),
    (["--rl.loss.type", "ppo"], "rl.loss", {"type": "ppo", "clip_ratio": [0.1, 0.2]}),
    (["--rl.importance_sampling", "{type='truncated', cap=3}"], "rl.importance_sampling.cap", 3),
    (["--cooperate.method.rl_weight", "0"], "cooperate.method.rl_weight_final", 0),
    (["--cooperate.method", "bridge"], "cooperate.method.meta_objective", True),
    (["--cooperate.method", "trapo", "--cooperate.method.prefix_groups", "1", "1", "1", "1"],
     "cooperate.method.prefix_groups", [1, 1, 1, 1]),
    (["--learner.lora.rank", "4"], "learner.lora.rank", 4),
    (["--corpus.sample.num-examples.my-teacher_plain", "9"], "corpus.sample.num_examples.my-teacher_plain", 9),
    (["--behavior.my-teacher_plain.path", "./x"], "behavior.my-teacher_plain.path", "./x"),
    (["--placement.learners.pear-ray/role", "learner"], "placement.learners",
     {"pear-ray/role": "learner"}),
    (["--placement.learners", "{'a.b/c' = 'd'}"], "placement.learners", {"a.b/c": "d"}),
    (["--tasks.0.options.max_number", "9"], "tasks.0.options", {"max_number": 9}),
    (["--arms.1.sft", "false"], "arms.1.sft", False),
    (["--arms.0.name", "x"], "arms.0.name", "x"),
    (["--study.hypothesis", "it = works"], "study.hypothesis", "it = works"),
]  # fmt: skip


def leaf(document, key):
    for part in key.split("."):
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


@pytest.mark.parametrize(("words", "key", "value"), OVERRIDES, ids=str)
def test_an_override_sets_its_key(path, words, key, value):
    document = json.loads(read_job(path, words).model_dump_json())
    assert leaf(document, key) == value


def test_an_override_changes_nothing_else(path):
    words = ["--rl.group-size", "8", "--run.dir", "elsewhere", "--arms.1.name", "other"]
    expected = json.loads(read_job(path).model_dump_json())
    expected["rl"]["group_size"] = 8
    expected["run"]["dir"] = "elsewhere"
    expected["arms"][1]["name"] = "other"
    assert json.loads(read_job(path, words).model_dump_json()) == expected


def test_derived_defaults_follow_an_override(path):
    assert read_job(path, ["--learner.num_workers", "1"]).learner.min_workers == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run"], "command line: expected --section.key value, got 'run'"),
        (["--sft.level"], "command line: sft.level: expected a value, got none"),
        (["--sft.levle", "x"], "command line: sft.levle: unknown key, got 'x'; expected one of: b"),
        (["--stf.level", "x"], "command line: stf: unknown key"),
        (["--sft.level", "blok"], "command line: sft.level: expected 'none', 'token'"),
        (["--rl.steps", "many"], "command line: rl.steps: expected a valid integer, got 'many'"),
        (["--rl.steps", "1", "2"], "command line: rl.steps: expected a valid integer, got [1, 2]"),
        (["--arms.5.name", "x"], "command line: expected the index of one of 2 items, got '5'"),
        (["--arms.1.name", "plain"], "command line: arms: expected each name once"),
        (["--generator.max-model-len", "8"], "{path}: generator.max_new_tokens: expected less"),
        (["--rl.loss", "nft", "--rl.loss.clip_ratio", "1", "1"], "command line: rl.loss.clip_ratio"),
        (["--rl.loss.type", "nft"], "{path}: rl.loss.clip_ratio: unknown key"),
        (["--cooperate.method.frozen-frac", "0.5"], "command line: cooperate.method.frozen_frac: unknown key, got 0.5"),
    ],
    ids=str,
)
def test_a_mistake_in_an_override_is_refused(path, words, expected):
    assert refusal(path, words)[0].startswith(expected.format(path=path))


# An arm changes some keys of a union of tables and keeps the others.
BASE = {
    "run": {"dir": "runs/arms"},
    "model": {"path": "base"},
    "corpus": {"scored_path": "scored"},
    "tasks": [{"name": "countdown"}],
    "generator": {"max_new_tokens": 8, "max_model_len": 16},
}


def arm_of(arm, **sections):
    job = Job.model_validate(BASE | sections | {"arms": [{"name": "a", **arm}]})
    return job.of_arm(job.arms[0])


@pytest.mark.parametrize(
    ("change", "kind", "clip_ratio"),
    [
        ({"clip_ratio": [0.1, 0.2]}, "gspo", (0.1, 0.2)),
        ("gspo", "gspo", (0.3, 0.4)),
        ("cispo", "cispo", (1.0, 3.0)),
        ({"type": "ppo", "clip_ratio": [0.1, 0.1]}, "ppo", (0.1, 0.1)),
    ],
    ids=str,
)
def test_an_arm_keeps_the_type_of_a_loss_unless_it_names_another(change, kind, clip_ratio):
    arm = arm_of({"rl": {"loss": change}}, rl={"loss": {"type": "gspo", "clip_ratio": [0.3, 0.4]}})
    assert (arm.rl.loss.type, arm.rl.loss.clip_ratio) == (kind, clip_ratio)


def test_an_arm_keeps_the_type_of_an_objective():
    arm = arm_of({"sft": {"objective": {"alpha": 0.3}}}, sft={"objective": "trsft"})
    assert (arm.sft.objective.type, arm.sft.objective.alpha) == ("trsft", 0.3)


def test_a_key_derived_from_a_changed_one_follows_it():
    method = arm_of({"cooperate": {"method": {"rl_weight": 0.2}}}, cooperate={"method": "bridge"}).cooperate.method
    assert (method.type, method.rl_weight, method.rl_weight_final) == ("bridge", 0.2, 0.2)


def test_traces_of_trapo_keep_the_alpha_of_sft():
    job = arm_of(
        {"cooperate": {}}, sft={"objective": {"type": "trsft", "alpha": 0.3}}, cooperate={"method": "trapo"},
        rl={"group_size": 8},
    )  # fmt: skip
    assert job.cooperate.sft_of(job.sft).objective.alpha == 0.3
