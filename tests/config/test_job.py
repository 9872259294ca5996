"""A job: read from a file, resolved for an arm, and every mistake in it named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from pear_ray import config
from pear_ray.config import Job, read_job
from pear_ray.config.errors import known_keys
from pear_ray.config.job import Section
from pear_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
JOB_FILES = sorted((ROOT / "jobs").glob("*.toml"))

DOCUMENT = {
    "run": {"dir": "runs/one"},
    "model": {"pretrain": {"styles": {"build": 1.0}}},
    "behavior": {"tutor": {"path": "./tutor"}},
    "corpus": {"sample": {"num_examples": {"tutor": 3}}},
    "sft": {"learning_rate": 0.5, "level": "block"},
    "rl": {"group_size": 4},
    "generator": {"max_new_tokens": 8, "max_model_len": 16},
    "tasks": [{"name": "countdown"}],
    "arms": [
        {"name": "plain", "sft": {"level": "none"}},
        {"name": "pear", "rl": {"group_size": 2, "advantage": "rloo"}},
    ],
}


def sections():
    named = {**vars(config)}.values()
    return [c for c in named if isinstance(c, type) and issubclass(c, Section) and c is not Section]


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.name)
def test_job_files_of_the_repository_read_back_from_json(path, tmp_path):
    job = read_job(path)
    copy = tmp_path / "config.json"
    copy.write_text(job.model_dump_json(indent=2))
    assert read_job(copy) == job


def test_there_are_job_files():
    assert {"laptop.toml"} <= {path.name for path in JOB_FILES}


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_key_is_explained(section):
    unexplained = [n for n, field in section.model_fields.items() if not field.description]
    assert not unexplained


def test_a_job_cannot_be_changed():
    job = Job(**DOCUMENT)
    with pytest.raises(ValidationError, match="frozen"):
        job.sft.level = "token"


def test_paths_of_models():
    job = Job(**DOCUMENT)
    assert job.model_path() == str(Path("runs/one/pretrain/base").absolute())
    assert job.model_path("tutor") == "./tutor"
    assert job.scored_folder == Path("runs/one/scored")


def test_an_arm_is_a_job_of_its_own_on_the_same_corpus():
    job = Job(**DOCUMENT)
    plain, pear = (job.of_arm(arm) for arm in job.arms)
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


def test_arms_leave_the_job_as_it_was():
    job = Job(**DOCUMENT)
    before = job.model_dump_json()
    for arm in job.arms:
        job.of_arm(arm)
    assert job.model_dump_json() == before


@pytest.mark.parametrize(
    ("location", "known"),
    [
        ((), "arms"),
        (("sft",), "clip_log_ratio"),
        (("model", "pretrain"), "num_layers"),
        (("corpus", "sample"), "num_examples"),
        (("behavior", "tutor"), "path"),
        (("behavior", "tutor", "pretrain"), "styles"),
        (("tasks", 0), "options"),
        (("arms", 1), "rl"),
    ],
)
def test_known_keys_of_any_place(location, known):
    assert known in known_keys(location, Job)


def test_every_mistake_is_named_at_once(tmp_path):
    path = tmp_path / "job.json"
    wrong = {**DOCUMENT, "sft": {"epochs": 0, "levle": 1}, "rl": {"steps": "many"}}
    path.write_text(json.dumps(wrong))
    with pytest.raises(ConfigError) as refusal:
        read_job(path)
    lines = str(refusal.value).splitlines()
    assert len(lines) == 3 and all(line.startswith(f"{path}: ") for line in lines)
    for field in ("sft.epochs", "sft.levle", "rl.steps"):
        assert any(f" {field}: " in line for line in lines)
