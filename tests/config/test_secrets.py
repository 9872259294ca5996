"""Values that look like secrets are refused and never printed."""

from __future__ import annotations

from pathlib import Path

import pytest

SECRET = "pl4nted-s3cret"
JOB = """
run.dir = "run"
model.path = "./model"
generator = {max_new_tokens = 8, max_model_len = 16}
tasks = [{name = "countdown"}]
"""


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("field", "lines"),
    [
        ("tasks.0.options.api_key", f'[[tasks]]\nname = "m:T"\noptions = {{api_key = "{SECRET}"}}'),
        ("corpus.path", f'[corpus]\npath = "s3://key:{SECRET}@bucket/rows"'),
        ("corpus.path", f'[corpus]\npath = "https://h/a.jsonl?X-Amz-Signature={SECRET}"'),
        ("model.path", f'[model]\npath = "hf_{"x" * 30}{SECRET}"'),
        ("tracking.wandb_token", f'[tracking]\nwandb_token = "{SECRET}"'),
        ("tasks.0.options.token", f'[[tasks]]\nname = "m:T"\noptions = {{token = "{SECRET}"}}'),
    ],
)
def test_a_secret_in_a_job_is_refused_and_not_printed(empty, pear_ray, field, lines):
    Path("job.toml").write_text(lines)
    code, stdout, stderr = pear_ray("score", "job.toml")
    assert code == 2 and f"job.toml: {field}: expected no secret in a job" in stderr
    assert SECRET not in stdout + stderr
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("corpus.path", ("--corpus.path", f"s3://key:{SECRET}@bucket/rows")),
        ("corpus.path", (f"--corpus.path=s3://key:{SECRET}@bucket/rows",)),
        ("tasks.0.options.api-key", ("--tasks.0.options.api-key", SECRET)),
        ("tasks.0.options.api_key", ("--tasks.0.options", f"{{api_key = '{SECRET}'}}")),
        ("tracking.wandb_api_key", (f"--tracking.wandb_api_key={SECRET}",)),
    ],
)
def test_a_secret_on_the_command_line_is_refused_and_not_printed(empty, pear_ray, field, words):
    Path("job.toml").write_text(JOB)
    code, stdout, stderr = pear_ray("score", "job.toml", *words)
    assert code == 2 and f"command line: {field}: expected no secret" in stderr
    assert SECRET not in stdout + stderr
    assert not Path("run").exists()
