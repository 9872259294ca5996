"""Stage `rl` on real engines and learners: on-policy runs repeat to the bit, even if interrupted; recorded rollouts can
be replayed; adapters can be trained off-policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pear_ray.__main__ import run_command
from tests.rl.runs import are_equal, rows, run_cut_off, weights

STEPS = 8
# Metrics that do not depend on the speed of the machine.
METRICS = (
    "loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "pass_rate", "first_problem",
    "next_problem", "problems_dropped", "ratio_mean", "completions_clipped_ratio",
)  # fmt: skip
JOB = """
[run]
dir = "{folder}/run"
seed = 7
[model]
path = "{model}"
dtype = "float32"
[rl]
steps = {steps}
prompts_per_step = 4
group_size = 4
learning_rate = 1e-3
dynamic_sampling = true
{rl}
[generator]
num_cpus = 0.5
max_new_tokens = 8
max_model_len = 24
max_num_seqs = 64
timeout_seconds = 200
[learner]
num_workers = 1
cpus_per_worker = 0.5
tokens_per_micro_batch = 256
save_every = 2
timeout_seconds = 200
{learner}
[weights]
max_logprob_gap = 1e-4
[rewards]
processes = 1
[evaluation]
num_problems = 6
samples_per_problem = 4
ks = [1]
[[tasks]]
name = "tests.rl.parity_task:Parity"
"""


@pytest.fixture(scope="module")
def write_job(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that writes a job file with extra lines in [rl] and [learner]."""

    def write(rl: str = "", learner: str = "", steps: int = STEPS) -> Path:
        folder = tmp_path_factory.mktemp("rl")
        text = JOB.format(folder=folder, model=tiny_model(True), steps=steps, rl=rl, learner=learner)
        (folder / "job.toml").write_text(text)
        return folder / "job.toml"

    return write


@pytest.fixture(scope="module")
def plain(write_job: Any, ray_session: None) -> Path:
    """An on-policy run without interruption, evaluated and recorded."""
    job = write_job(rl="record = true\neval_every = 3")
    assert run_command(["rl", str(job)]) == 0
    return job


@pytest.fixture(scope="module")
def interrupted(write_job: Any, plain: Path) -> Path:
    """The same, interrupted and resumed."""
    job = write_job(rl="record = true\neval_every = 3")
    run_cut_off("rl", job, STEPS)
    return job


@pytest.fixture(scope="module")
def replayed(write_job: Any, plain: Path) -> Path:
    """Learners alone, on the recorded rollouts of `plain`."""
    job = write_job(rl=f'replay = "{plain.parent}/run/rl/rollouts"')
    assert run_command(["rl", str(job)]) == 0
    return job


@pytest.fixture(scope="module")
def adapters(write_job: Any, ray_session: None) -> Path:
    """Adapters, one step off-policy, with other loss settings and a KL penalty."""
    ahead = """
        max_staleness = 1
        loss = "gspo"
        importance_sampling = "truncated"
        loss_agg = "sequence"
        kl_coefficient = 0.01
    """
    lora = "lora = {rank = 4, targets = ['q_proj', 'down_proj']}"
    # Engines may skip every other version: long enough to check some.
    job = write_job(rl=ahead, learner=lora, steps=STEPS + 4)
    assert run_command(["rl", str(job)]) == 0
    return job


def metrics(job: Path, names: tuple[str, ...] = METRICS) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names} for row in rows(job)]


@pytest.mark.timeout(900)
def test_an_interrupted_run_repeats_to_the_bit(plain: Path, interrupted: Path) -> None:
    assert [row["step"] for row in rows(plain)] == list(range(STEPS))
    assert metrics(interrupted) == metrics(plain)
    assert are_equal(weights(interrupted, "rl"), weights(plain, "rl"))


def test_groups_of_equal_rewards_are_replaced(plain: Path) -> None:
    assert sum(row["problems_dropped"] for row in rows(plain)) > 0
    for row in rows(plain):
        assert row["next_problem"] - row["first_problem"] == 4 + row["problems_dropped"]
    assert all(row["grad_norm"] > 0 for row in rows(plain))


def test_replay_repeats_the_recorded_run_to_the_bit(plain: Path, replayed: Path) -> None:
    assert metrics(replayed) == metrics(plain)


def test_log_probs_of_engines_and_learner_agree(plain: Path, adapters: Path) -> None:
    for job, least in ((plain, STEPS - 1), (adapters, STEPS / 2)):
        gaps = [row["logprob_parity_max"] for row in rows(job) if row["logprob_parity_max"] is not None]
        assert len(gaps) >= least and max(gaps) <= 1e-4


def test_held_out_problems_are_evaluated_and_the_best_weights_kept(plain: Path) -> None:
    found = {r["eval_version"]: r["pass_at_1"] for r in rows(plain) if "pass_at_1" in r}
    assert found.keys() == {0, 3, 6} and all(0 <= rate <= 1 for rate in found.values())
    best = plain.parent / "run" / "rl" / "best" / "model.safetensors"
    assert best.exists() == (max(found[3], found[6]) > found[0])
    assert not list((plain.parent / "run" / "rl" / "evaluated").iterdir())


def test_samples_are_written_as_text(plain: Path) -> None:
    samples = sorted((plain.parent / "run" / "rl" / "samples").iterdir())
    assert len(samples) == STEPS
    text = samples[-1].read_text()
    assert f"step {STEPS - 1}, problem parity-" in text and "--- completion 3: reward " in text


def test_adapters_are_trained_and_merged(adapters: Path, tiny_model: Any) -> None:
    exported = weights(adapters, "rl")
    base = load_file(tiny_model(True) / "model.safetensors")
    changed = {name for name in base if not torch.equal(exported[name], base[name])}
    assert changed == {name for name in base if "q_proj" in name or "down_proj" in name}


def test_only_adapters_are_published(adapters: Path, plain: Path) -> None:
    alone, whole = (rows(job)[0]["published_mib_per_rank"] for job in (adapters, plain))
    assert alone < whole / 4


def test_staleness_is_bounded(adapters: Path) -> None:
    steps = rows(adapters)
    assert max(row["staleness_max"] for row in steps) == 1
    assert all(0 < row["effective_sample_size"] <= 1 + 1e-6 for row in steps)
    assert max(row["reference_kl"] for row in steps) > 0
