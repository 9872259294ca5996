"""The command line: bad input is refused by name with code 2, and nothing is left behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pear_ray import __main__ as command_line
from pear_ray.config import Job, read_job
from pear_ray.preflight import check_inputs
from pear_ray.run import OUTPUTS, open_run

ROOT = Path(__file__).parents[1]
SCRIPT = str(Path(sys.executable).with_name("pear-ray"))
JOB = """
[run]
dir = "run"
[model]
path = "./model"
[corpus]
path = "corpus.jsonl"
[behavior.tutor]
path = "./model"
[generator]
max_new_tokens = 8
max_model_len = 16
[evaluation]
ks = [1, 4]
[[tasks]]
name = "countdown"
"""
SAMPLED = ('path = "corpus.jsonl"', "sample = {num_examples = {tutor = 5}}")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a job file and everything it names."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        Path("model", name).write_text("{}")
    Path("corpus.jsonl").write_text('{"example_id": "a"}\n')
    Path("job.toml").write_text(JOB)
    return tmp_path


def contents(folder):
    """Path and bytes of every file below, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def plain(text):
    """Without the frames that tyro draws and the lines it breaks."""
    return " ".join(re.sub(r"[╭╮╰╯│─]", " ", text).split())


def assert_refused(folder, pear_ray, words, said):
    """Exit code 2, every part of the message, and nothing written. Returns the message."""
    before = contents(folder)
    code, printed, complained = pear_ray(*words)
    assert code == 2 and not printed
    for part in said:
        assert part in plain(complained), part
    assert contents(folder) == before
    return complained


def replaced(old, new):
    assert old in JOB
    return JOB.replace(old, new)


# What is wrong: (text of the job file, what the message says)
MISTAKES = {
    "unknown key": (
        JOB + "[sft]\nlevle = 'token'",
        ["job.toml", "sft.levle", "unknown key", "level", "read 'token'"],
    ),
    "unknown section": (JOB + "[stf]\nlevel = 'token'", ["job.toml", "stf: unknown key", "sft"]),
    "unknown key of a behavior model": (
        replaced("[behavior.tutor]", "[behavior.tutor]\nprecision = 8"),
        ["behavior.tutor.precision", "unknown key", "path, pretrain", "read 8"],
    ),
    "a word for a number": (
        JOB + "[rl]\nsteps = 'many'",
        ["job.toml: rl.steps", "valid integer", "read 'many'"],
    ),
    "a number for a word": (
        replaced('dir = "run"', "dir = 3"),
        ["job.toml: run.dir", "valid string", "read 3"],
    ),
    "half a replica": (
        replaced("max_new_tokens", "num_engines = 1.5\nmax_new_tokens"),
        ["generator.num_engines", "valid integer", "read 1.5"],
    ),
    "one bound for two": (
        JOB + "[sft]\nclip_log_ratio = [0.3]",
        ["sft.clip_log_ratio", "required", "read [0.3]"],
    ),
    "not one of the names": (
        JOB + "[rl]\nadvantage = 'ppo'",
        ["rl.advantage", "'grpo', 'dr_grpo' or 'rloo'", "read 'ppo'"],
    ),
    "unknown task": (
        replaced('"countdown"', '"countdwn"'),
        ["tasks.0.name", "'countdown'", "got 'countdwn'"],
    ),
    "unknown option": (JOB + "options = {depth = 3}", ["tasks.0.options", "'depth'"]),
    "no task": (replaced('[[tasks]]\nname = "countdown"', ""), ["job.toml: tasks", "required"]),
    "no section": (
        replaced("[generator]\nmax_new_tokens = 8\nmax_model_len = 16", ""),
        ["job.toml: generator", "required"],
    ),
    "no key": (
        replaced("max_new_tokens = 8", ""),
        ["job.toml: generator.max_new_tokens", "required"],
    ),
    "out of range": (
        JOB + "[sft]\ndiscount = 1.5",
        ["sft.discount", "less than or equal to 1", "read 1.5"],
    ),
    **{
        f"{value} for a number": (
            JOB + f"[sft]\nlearning_rate = {value}",
            ["sft.learning_rate", "finite number", f"read {value}"],
        )
        for value in ("nan", "inf")
    },
    "bounds in the wrong order": (
        JOB + "[sft]\nclip_log_ratio = [0.3, -0.08]",
        ["sft", "clip_log_ratio: read [0.3, -0.08]", "expected the lower bound first"],
    ),
    "not TOML": (replaced("[model]", "[model"), ["job.toml: is not TOML", "line 4"]),
    "arm with an unknown key": (
        JOB + "[[arms]]\nname = 'a'\nsft = {levle = 'token'}",
        ["job.toml", "arms.a.sft: levle", "unknown key", "level", "read 'token'"],
    ),
    "arm with a wrong value": (
        JOB + "[[arms]]\nname = 'a'\nrl = {group_size = 1}",
        ["job.toml", "arms.a.rl: group_size", "greater than 1", "read 1"],
    ),
    "two arms of one name": (
        JOB + "[[arms]]\nname = 'a'\n[[arms]]\nname = 'a'",
        ["job.toml", "arms", "each name once, read ['a', 'a']"],
    ),
    "an arm like a path": (JOB + "[[arms]]\nname = '../a'", ["arms.0.name", "read '../a'"]),
    "k larger than the samples": (
        replaced("ks = [1, 4]", "ks = [1, 64]\nsamples_per_problem = 8"),
        ["job.toml: evaluation", "ks holds 64", "samples_per_problem 8"],
    ),
    "no room for a prompt": (
        replaced("max_new_tokens = 8", "max_new_tokens = 16"),
        ["job.toml: generator", "max_new_tokens 16", "max_model_len 16"],
    ),
    "sampled source without a model": (
        replaced(SAMPLED[0], "sample = {num_examples = {coder = 5}}"),
        ["job.toml", "corpus.sample.num_examples", "'coder'", "['tutor']"],
    ),
    "less than nothing to sample": (
        replaced(SAMPLED[0], "sample = {num_examples = {tutor = -5}}"),
        ["corpus.sample.num_examples.tutor", "greater than 0", "read -5"],
    ),
    "corpus both read and sampled": (
        replaced(*SAMPLED).replace("[behavior", 'path = "corpus.jsonl"\n[behavior'),
        ["job.toml: corpus", "either path or sample"],
    ),
    "a question without its answer": (
        JOB + "[corpus.columns]\nprompt = 'question'",
        ["job.toml: corpus.columns", "give prompt and response together, or neither"],
    ),
    **{
        f"{key} without a model": (
            replaced(SAMPLED[0], f"{SAMPLED[0]}\n{key} = 'coder'"),
            ["job.toml", f"corpus.{key}: read 'coder', expected one of [behavior]: ['tutor']"],
        )
        for key in ("source", "fallback_scorer")
    },
    "not one of the ways with long rows": (
        replaced(SAMPLED[0], SAMPLED[0] + "\non_overlength = 'cut'"),
        ["job.toml: corpus.on_overlength", "'reject' or 'truncate'", "read 'cut'"],
    ),
    "more engines at first than at last": (
        replaced("max_new_tokens", "min_engines = 3\nnum_engines = 2\nmax_new_tokens"),
        ["job.toml: generator", "min_engines 3 is more than num_engines 2"],
    ),
    "more requests than tokens": (
        replaced("max_new_tokens", "max_num_batched_tokens = 99\nmax_new_tokens"),
        ["job.toml: generator", "max_num_batched_tokens 99 is less than max_num_seqs 256"],
    ),
    "model both read and made": (
        replaced("[corpus]", "[model.pretrain]\nstyles = {build = 1.0}\n[corpus]"),
        ["job.toml: model", "either path", "or pretrain"],
    ),
    "model neither read nor made": (
        replaced('[model]\npath = "./model"', "[model]"),
        ["job.toml: model", "either path", "or pretrain"],
    ),
    "no corpus": (replaced(SAMPLED[0], ""), ["corpus.path", "missing", "Parquet or JSONL"]),
    "corpus that is not there": (
        replaced("corpus.jsonl", "nowhere.jsonl"),
        ["corpus.path", "read 'nowhere.jsonl'", "expected a file or folder that exists"],
    ),
    "pattern that nothing fits": (
        replaced("corpus.jsonl", "corpus*.parquet"),
        ["corpus.path", "read 'corpus*.parquet'", "expected a file or folder that exists"],
    ),
    "model that is not there": (
        replaced('[model]\npath = "./model"', '[model]\npath = "./nowhere"'),
        ["model.path", "read './nowhere'", "expected a folder that exists"],
    ),
    "behavior model that is not there": (
        replaced('tutor]\npath = "./model"', 'tutor]\npath = "./nowhere"'),
        ["behavior.tutor.path", "read './nowhere'", "expected a folder that exists"],
    ),
    "checkpoint that is not there": (
        replaced("ks = [1, 4]", "checkpoints = {old = './old'}"),
        ["evaluation.checkpoints.old", "read './old'", "expected a folder that exists"],
    ),
}
# The same on the command line: (text of the job file, words after it, what the message says)
OVERRIDES = {
    "unknown key": (JOB, ("--sft.levle", "block"), ["--sft.levle"]),
    "not one of the names": (
        JOB,
        ("--sft.level", "blok"),
        ["invalid choice 'blok'", "--sft.level", "'sequence'"],
    ),
    "a word for a number": (JOB, ("--rl.steps", "many"), ["--rl.steps", "many", "int"]),
    "out of range": (JOB, ("--sft.discount", "0"), ["sft", "discount", "greater than 0", "0.0"]),
    "impossible together": (
        JOB,
        ("--generator.max-model-len", "8"),
        ["generator", "max_new_tokens 8", "max_model_len 8"],
    ),
    "sections that disagree": (
        replaced(*SAMPLED) + "[[arms]]\nname = 'a'\n[[arms]]\nname = 'b'",
        ("--arms.1.name", "a"),
        ["arms", "each name once", "['a', 'a']"],
    ),
    "no value": (JOB, ("--sft.level",), ["--sft.level", "Missing value"]),
    "missing file": (
        JOB,
        ("--corpus.path", "nowhere"),
        ["corpus.path", "read 'nowhere'", "expected a file or folder that exists"],
    ),
    "a word too many": (JOB, ("run",), ["Unrecognized", "run"]),
}


@pytest.mark.parametrize(("text", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_job_is_refused_by_name(here, pear_ray, text, said):
    Path("job.toml").write_text(text)
    assert_refused(here, pear_ray, ("score", "job.toml"), said)


@pytest.mark.parametrize(("text", "words", "said"), OVERRIDES.values(), ids=OVERRIDES)
def test_a_mistake_in_an_override_is_refused_by_name(here, pear_ray, text, words, said):
    Path("job.toml").write_text(text)
    assert_refused(here, pear_ray, ("score", "job.toml", *words), said)


@pytest.mark.parametrize(
    "words",
    [
        ("--sft.level", "token", "--run.dir", "elsewhere"),
        ("--evaluation.checkpoints", "token", "./model"),
    ],
)
def test_a_level_or_a_checkpoint_called_token_is_no_secret(here, pear_ray, words):
    code, printed, complained = pear_ray("sft", "job.toml", *words, "--dry-run")
    assert code == 0, complained
    assert "token" in printed


@pytest.mark.parametrize(
    "path",
    ["corpus.jsonl", "corpus*", "corp[a-u]s.json*", ".", "*/*.json", "s3://bucket/x/*.parquet"],
)
def test_a_corpus_that_is_here_or_lies_elsewhere_is_not_refused(here, path):
    Path("job.toml").write_text(replaced("corpus.jsonl", path))
    before = contents(here)
    check_inputs(read_job(Path("job.toml")), "score")
    assert contents(here) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trian", "job.toml"), ["stage: read 'trian'", "sft, rl"]),
        (("sft", "nowhere.toml"), ["nowhere.toml", "No such file", "expected a job file"]),
        (("sft", "model"), ["model: cannot be read", "expected a job file"]),
        (("sft", "image.toml"), ["image.toml: cannot be read", "expected a job file"]),
        (("sft", "broken.json"), ["broken.json", "Invalid JSON"]),
        (("sft",), ["job: missing", "expected the path of a job file"]),
        (("sample", "job.toml"), ["corpus.sample: missing", "expected how many"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_command_that_cannot_be_meant_is_refused(here, pear_ray, words, said):
    Path("image.toml").write_bytes(b"\x89PNG\xff\xfe")
    Path("broken.json").write_text('{"run": ')
    assert_refused(here, pear_ray, words, said)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "./model/config.json is missing; expected a Hugging Face folder"),
        ("tokenizer.json", "./model holds no tokenizer; expected tokenizer.json"),
    ],
)
def test_a_model_folder_that_is_not_whole_is_refused(here, pear_ray, missing, said):
    Path("model", missing).unlink()
    assert_refused(here, pear_ray, ("sft", "job.toml"), [f"model.path: {said}"])


def test_a_run_folder_that_cannot_be_made_is_refused(here, pear_ray):
    Path("run").write_text("a file")
    said = ["run.dir: read 'run'; expected a folder that can be made"]
    assert_refused(here, pear_ray, ("sft", "job.toml"), said)


def test_the_run_folder_of_another_job_is_refused_and_left_alone(here, pear_ray):
    with open_run(read_job(Path("job.toml"))) as run:
        run.run_stage("pretrain", lambda job, run: {"made": 1})
    words = ("score", "job.toml", "--sft.level", "block", "--run.seed", "7", "--rl.steps", "3")
    said = [
        "run/config.json: this run folder belongs to another job",
        "another run.dir. Differing keys: rl.steps: there 200, here 3",
        "run.seed: there 0, here 7 sft.level: there 'token', here 'block'",
    ]
    assert "rl.group_size" not in assert_refused(here, pear_ray, words, said)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.toml")), ids=lambda p: p.name)
def test_dry_run_prints_the_job_and_touches_nothing(path, tmp_path, monkeypatch, pear_ray):
    monkeypatch.chdir(tmp_path)
    code, printed, _ = pear_ray("pipeline", str(path), "--dry-run")
    assert code == 0
    assert contents(tmp_path) == {}
    assert Job.model_validate(json.loads(printed)) == read_job(path)
    Path("resolved.json").write_text(printed)
    assert pear_ray("pipeline", "resolved.json", "--dry-run")[:2] == (0, printed)


@pytest.mark.parametrize("spelling", ["--rl.group_size", "--rl.group-size"])
def test_overrides_change_what_they_name_and_nothing_else(here, pear_ray, spelling):
    text = replaced(*SAMPLED) + "options = {max_number = 9}\n[[arms]]\nname = 'a'\n"
    Path("job.toml").write_text(text)
    expected = json.loads(pear_ray("sft", "job.toml", "--dry-run")[1])
    changes = ["--dry-run", "--sft.clip-log-ratio", "-0.5", "0.5", "--run.dir", "elsewhere"]
    changes += [spelling, "16", "--corpus.sample.num-examples.tutor", "9"]
    found = json.loads(pear_ray("sft", "job.toml", *changes)[1])
    expected["rl"]["group_size"] = 16
    expected["sft"]["clip_log_ratio"] = [-0.5, 0.5]
    expected["run"]["dir"] = "elsewhere"
    expected["corpus"]["sample"]["num_examples"]["tutor"] = 9
    assert found == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "usage: pear-ray STAGE JOB.toml"),
        (("--help",), "pipeline"),
        (("sft", "--help"), "usage: pear-ray STAGE JOB.toml"),
        (("sft", "job.toml", "--help"), "--sft.clip-log-ratio"),
    ],
)
def test_help(here, pear_ray, words, said):
    before = contents(here)
    code, printed, complained = pear_ray(*words)
    assert code == 0 and said in printed and not complained
    assert contents(here) == before


def test_every_stage_is_known_by_what_it_leaves():
    assert OUTPUTS.keys() == command_line.STAGES.keys()


@pytest.mark.parametrize("program", [[sys.executable, "-m", "pear_ray"], [SCRIPT]], ids=len)
def test_exit_codes_of_the_real_program(here, program):
    good = subprocess.run([*program, "sft", "job.toml", "--dry-run"], capture_output=True)
    bad = subprocess.run(
        [*program, "sft", "job.toml", "--sft.epochs", "0"], capture_output=True, text=True
    )
    assert good.returncode == 0 and json.loads(good.stdout)["run"]["dir"] == "run"
    assert bad.returncode == 2 and "epochs" in bad.stderr and "Traceback" not in bad.stderr


def test_anything_else_ends_with_code_1(here):
    """A run folder whose manifest was destroyed: no mistake in the job."""
    Path("run").mkdir()
    Path("run", "manifest.json").write_text("{")
    ended = subprocess.run(
        [sys.executable, "-m", "pear_ray", "sft", "job.toml"], capture_output=True, text=True
    )
    assert ended.returncode == 1 and "Traceback" in ended.stderr
