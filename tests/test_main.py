"""The command line: bad input is refused with exit code 2, and nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pear_ray import __version__
from pear_ray.__main__ import STAGES
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
[behavior.teacher_plain]
path = "./model"
[generator]
max_new_tokens = 8
max_model_len = 16
[evaluation]
ks = [1, 4]
[[tasks]]
name = "countdown"
"""
START_FROM = "[behavior.teacher_plain.pretrain]\nstyles = {build = 1}\nstart_from = 'nobody'"
SAMPLED = ('path = "corpus.jsonl"', "sample = {num_examples = {teacher_plain = 5}}")


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


def assert_refused(folder, pear_ray, words, message):
    """Exit code 2, this message, and nothing written. Returns the message."""
    before = contents(folder)
    code, stdout, stderr = pear_ray(*words)
    assert code == 2 and not stdout
    assert f"pear-ray: {message}" in stderr, stderr
    assert contents(folder) == before
    return stderr


def replaced(old, new):
    assert old in JOB
    return JOB.replace(old, new)


# Text of the job file, and the message after "job.toml: ".
MISTAKES = {
    "unknown key": (
        JOB + "[sft]\nlevle = 'token'",
        "sft.levle: unknown key, got 'token'; expected one of: betas, block_size, ",
    ),
    "unknown section": (JOB + "[stf]\nlevel = 'token'", "stf: unknown key; expected one of: arms,"),
    "unknown key of a behavior model": (
        replaced("[behavior.teacher_plain]", "[behavior.teacher_plain]\nprecision = 8"),
        "behavior.teacher_plain.precision: unknown key, got 8; expected one of: path, pretrain",
    ),
    "string for a number": (JOB + "[rl]\nsteps = 'many'", "rl.steps: expected a valid integer, got 'many'"),
    "number for a string": (replaced('dir = "run"', "dir = 3"), "run.dir: expected a valid string, got 3"),
    "not one of the names": (
        JOB + "[rl]\nadvantage = 'ppo'",
        "rl.advantage: expected 'grpo', 'dr_grpo' or 'rloo', got 'ppo'",
    ),
    "no task": (replaced('[[tasks]]\nname = "countdown"', ""), "tasks: missing; expected a value"),
    "no section": (replaced("[generator]\nmax_new_tokens = 8\nmax_model_len = 16", ""), "generator: missing"),
    "no key": (replaced("max_new_tokens = 8", ""), "generator.max_new_tokens: missing"),
    "out of range": (JOB + "[sft]\ndiscount = 1.5", "sft.discount: expected less than or equal to 1, got 1.5"),
    **{
        f"{value} for a number": (
            JOB + f"[sft]\nlearning_rate = {value}",
            f"sft.learning_rate: expected a finite number, got {value}",
        )
        for value in ("nan", "inf")
    },
    "not TOML": (replaced("[model]", "[model"), "expected TOML: "),
    "arm with an unknown key": (
        JOB + "[[arms]]\nname = 'a'\nsft = {levle = 'token'}",
        "arms.a.sft.levle: unknown key, got 'token'",
    ),
    "arm with a wrong value": (
        JOB + "[[arms]]\nname = 'a'\nrl = {group_size = 1}",
        "arms.a.rl.group_size: expected greater than 1, got 1",
    ),
    "two arms of one name": (
        JOB + "[[arms]]\nname = 'a'\n[[arms]]\nname = 'a'",
        "arms: expected each name once, got ['a', 'a']",
    ),
    "an arm like a path": (JOB + "[[arms]]\nname = '../a'", "arms.0.name: expected pattern "),
    "k larger than the samples": (
        replaced("ks = [1, 4]", "ks = [1, 64]\nsamples_per_problem = 8"),
        "evaluation.ks: expected at most samples_per_problem 8, got 64",
    ),
    "k of 0": (replaced("ks = [1, 4]", "ks = [0]"), "evaluation.ks.0: expected greater than 0"),
    "sampled source without a model": (
        replaced(SAMPLED[0], "sample = {num_examples = {teacher_cipher = 5}}"),
        "corpus.sample.num_examples.teacher_cipher: expected one of [behavior] ['teacher_plain'], got 'teacher_cipher'",
    ),
    "less than nothing to sample": (
        replaced(SAMPLED[0], "sample = {num_examples = {teacher_plain = -5}}"),
        "corpus.sample.num_examples.teacher_plain: expected greater than 0, got -5",
    ),
    "corpus both read and sampled": (
        replaced(*SAMPLED).replace("[behavior", 'path = "corpus.jsonl"\n[behavior'),
        "corpus.path: expected either path or sample, got both",
    ),
    "a question without its answer": (
        JOB + "[corpus.columns]\nprompt = 'question'",
        "corpus.columns.response: expected both prompt and response or neither, got one",
    ),
    **{
        f"{key} without a model": (
            replaced(SAMPLED[0], f"{SAMPLED[0]}\n{key} = 'teacher_cipher'"),
            f"corpus.{key}: expected one of [behavior] ['teacher_plain'], got 'teacher_cipher'",
        )
        for key in ("source", "fallback_scorer")
    },
    "not one of the ways with long rows": (
        replaced(SAMPLED[0], SAMPLED[0] + "\non_overlength = 'cut'"),
        "corpus.on_overlength: expected 'reject' or 'truncate', got 'cut'",
    ),
    "model both read and made": (
        replaced("[corpus]", "[model.pretrain]\nstyles = {build = 1.0}\n[corpus]"),
        "model.path: expected either path or pretrain, got both",
    ),
    "model neither read nor made": (
        replaced('[model]\npath = "./model"', "[model]"),
        "model.path: expected either path or pretrain, got neither",
    ),
    "a start from nowhere": (
        replaced('[behavior.teacher_plain]\npath = "./model"', START_FROM),
        "behavior.teacher_plain.pretrain.start_from: expected a model with `pretrain` and without start_from,"
        " got 'nobody'",
    ),
    "a study of unknown arms": (
        JOB + "[study]\narms = ['b']\n[[arms]]\nname = 'a'",
        "study.arms: expected names among ['a'], got ['b']",
    ),
    "an unknown baseline": (
        JOB + "[study]\nbaseline = 'b'\n[[arms]]\nname = 'a'",
        "study.baseline: expected one of ['a'], got 'b'",
    ),
    "a seed twice": (JOB + "[study]\nseeds = [1, 1]", "study.seeds: expected each one once"),
    "a rate above 1": (JOB + "[rank]\nafter_rl = {a = 2}", "rank.after_rl.a: expected a pass@1 from 0 to 1, got 2"),
}
# Text of the job file, and the message of a check of the job's inputs.
MISSING_INPUTS = {
    "unknown task": (replaced('"countdown"', '"countdwn"'), "tasks.0.name: "),
    "unknown option": (JOB + "options = {depth = 3}", "tasks.0.options: "),
    "no corpus": (replaced(SAMPLED[0], ""), "corpus.path: missing; expected a Parquet or JSONL"),
    **{
        f"no corpus at {path}": (
            replaced("corpus.jsonl", path),
            f"corpus.path: expected a file or folder that exists, got '{path}'",
        )
        for path in ("nowhere.jsonl", "corpus*.parquet")
    },
    "no model": (
        replaced('[model]\npath = "./model"', '[model]\npath = "./nowhere"'),
        "model.path: expected a folder that exists or a hub name, got './nowhere'",
    ),
    "no behavior model": (
        replaced('teacher_plain]\npath = "./model"', 'teacher_plain]\npath = "./nowhere"'),
        "behavior.teacher_plain.path: expected a folder that exists or a hub name, got './nowhere'",
    ),
    "no checkpoint": (
        replaced("ks = [1, 4]", "checkpoints = {old = './old'}"),
        "evaluation.checkpoints.old: expected a folder that exists or a hub name, got './old'",
    ),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_job_is_refused(here, pear_ray, text, message):
    Path("job.toml").write_text(text)
    assert_refused(here, pear_ray, ("score", "job.toml"), f"job.toml: {message}")


@pytest.mark.parametrize(("text", "message"), MISSING_INPUTS.values(), ids=MISSING_INPUTS)
def test_missing_inputs_are_refused(here, pear_ray, text, message):
    Path("job.toml").write_text(text)
    assert_refused(here, pear_ray, ("score", "job.toml"), message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sft.levle", "block"), "command line: sft.levle: unknown key, got 'block'"),
        (("--sft.discount", "0"), "command line: sft.discount: expected greater than 0, got 0"),
        (("--corpus.path", "nowhere"), "corpus.path: expected a file or folder that exists"),
        (("run",), "command line: expected --section.key value, got 'run'"),
    ],
)
def test_a_mistake_in_an_override_is_refused(here, pear_ray, words, message):
    assert_refused(here, pear_ray, ("score", "job.toml", *words), message)


@pytest.mark.parametrize(
    "words", [("--sft.level", "token", "--run.dir", "elsewhere"), ("--evaluation.checkpoints.token", "./model")]
)
def test_a_level_or_a_checkpoint_called_token_is_no_secret(here, pear_ray, words):
    code, stdout, stderr = pear_ray("sft", "job.toml", *words, "--dry-run")
    assert code == 0, stderr
    assert "token" in stdout


@pytest.mark.parametrize(
    "path", ["corpus.jsonl", "corpus*", "corp[a-u]s.json*", ".", "*/*.json", "s3://bucket/x/*.parquet"]
)
def test_a_corpus_that_is_here_or_lies_elsewhere_is_not_refused(here, path):
    Path("job.toml").write_text(replaced("corpus.jsonl", path))
    before = contents(here)
    check_inputs(read_job(Path("job.toml")), "score")
    assert contents(here) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian", "job.toml"), "stage: expected one of pretrain, sample, score, sft, rl"),
        (("sft", "nowhere.toml"), "nowhere.toml: expected a job file: [Errno 2] No such file"),
        (("sft", "model"), "model: expected a job file: "),
        (("sft", "image.toml"), "image.toml: expected a job file: "),
        (("sft", "broken.json"), "broken.json: expected JSON: "),
        (("sft", "list.json"), "list.json: expected a table"),
        (("sft",), "job: missing; expected a job file: "),
        (("sample", "job.toml"), "corpus.sample: missing; expected "),
        (("cooperate", "job.toml"), "cooperate: missing; expected a section [cooperate]"),
    ],
    ids=str,
)
def test_an_invalid_command_is_refused(here, pear_ray, words, message):
    Path("image.toml").write_bytes(b"\x89PNG\xff\xfe")
    Path("broken.json").write_text('{"run": ')
    Path("list.json").write_text("[]")
    assert_refused(here, pear_ray, words, message)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "expected a Hugging Face folder, got './model' without config.json"),
        ("tokenizer.json", "expected tokenizer.json and tokenizer_config.json beside config.json"),
    ],
)
def test_an_incomplete_model_folder_is_refused(here, pear_ray, missing, message):
    Path("model", missing).unlink()
    assert_refused(here, pear_ray, ("sft", "job.toml"), f"model.path: {message}")


def test_a_run_folder_that_cannot_be_made_is_refused(here, pear_ray):
    Path("run").write_text("a file")
    message = "run.dir: expected a folder that can be made, got 'run': "
    assert_refused(here, pear_ray, ("sft", "job.toml"), message)


def test_the_run_folder_of_another_job_is_refused_and_left_alone(here, pear_ray):
    with open_run(read_job(Path("job.toml"))) as run:
        run.run_stage("pretrain", lambda job, run: {"made": 1})
    words = ("score", "job.toml", "--sft.level", "block", "--run.seed", "7", "--rl.steps", "3")
    message = f"{here}/run/config.json: this run folder belongs to another job"
    differing = assert_refused(here, pear_ray, words, message).splitlines()[-3:]
    assert [line.strip() for line in differing] == [
        "rl.steps: there 200, here 3",
        "run.seed: there 0, here 7",
        "sft.level: there 'token', here 'block'",
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.toml")), ids=lambda p: p.name)
def test_dry_run_prints_the_job_and_touches_nothing(path, tmp_path, monkeypatch, pear_ray):
    monkeypatch.chdir(tmp_path)
    code, stdout, _ = pear_ray("pipeline", str(path), "--dry-run")
    assert code == 0
    assert contents(tmp_path) == {}
    assert Job.model_validate(json.loads(stdout)) == read_job(path)
    Path("resolved.json").write_text(stdout)
    assert pear_ray("pipeline", "resolved.json", "--dry-run")[:2] == (0, stdout)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "usage: pear-ray STAGE JOB.toml"),
        (("--help",), "pipeline"),
        (("sft", "--help"), "usage: pear-ray STAGE JOB.toml"),
        (
            ("sft", "job.toml", "--rl.steps", "7", "--help"),
            "--rl.steps 7\n    Optimizer steps; each trains on one batch of fresh rollouts.\n",
        ),
        (("sft", "job.toml", "-h"), '--behavior.teacher_plain.path "./model"\n    Hugging Face folder'),
        (("sft", "job.toml", "-h"), "--cooperate (unset)\n"),
        (("sft", "job.toml", "-h"), "--rl.loss.clip_ratio [0.2, 0.28]\n"),
        (("--version",), f"pear-ray {__version__}\n"),
    ],
    ids=str,
)
def test_help_and_version(here, pear_ray, words, expected):
    before = contents(here)
    code, stdout, stderr = pear_ray(*words)
    assert code == 0 and expected in stdout and not stderr
    assert contents(here) == before


def test_every_stage_has_an_output():
    assert OUTPUTS.keys() == STAGES.keys()


@pytest.mark.parametrize("program", [[sys.executable, "-m", "pear_ray"], [SCRIPT]], ids=len)
def test_exit_codes_of_the_real_program(here, program):
    good = subprocess.run([*program, "sft", "job.toml", "--dry-run"], capture_output=True)
    bad = subprocess.run([*program, "sft", "job.toml", "--sft.epochs", "0"], capture_output=True, text=True)
    assert good.returncode == 0 and json.loads(good.stdout)["run"]["dir"] == "run"
    assert bad.returncode == 2 and "epochs" in bad.stderr and "Traceback" not in bad.stderr


def test_anything_else_ends_with_code_1(here):
    """A run folder that the system cannot read: no mistake in the job."""
    Path("run", "manifest.json").mkdir(parents=True)
    ended = subprocess.run([sys.executable, "-m", "pear_ray", "sft", "job.toml"], capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" in ended.stderr
