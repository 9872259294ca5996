"""Stage `rl` on real engines and learners: repeats to the bit on-policy, also when it was cut off;
learns again from what it recorded; trains adapters ahead of the learners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pear_ray.__main__ import run_command
from tests.rl.runs import are_equal, rows, run_cut_off, weights

STEPS = 8
# What a step's row says that does not depend on how fast the machine was.
NUMBERS = (
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
name = "tests.rl.parity:Parity"
"""


@pytest.fixture(scope="module")
def write_job(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a job file in a folder of its own, with further lines in [rl] and [learner]."""

    def write(rl: str = "", learner: str = "", steps: int = STEPS) -> Path:
        folder = tmp_path_factory.mktemp("rl")
        text = JOB.format(
            folder=folder, model=tiny_model(True), steps=steps, rl=rl, learner=learner
        )
        (folder / "job.toml").write_text(text)
        return folder / "job.toml"

    return write


@pytest.fixture(scope="module")
def plain(write_job: Any, ray_session: None) -> Path:
    """A run in one go, on-policy, evaluated on the way and recorded."""
    job = write_job(rl="record = true\neval_every = 3")
    assert run_command(["rl", str(job)]) == 0
    return job


@pytest.fixture(scope="module")
def stopped(write_job: Any, plain: Path) -> Path:
    """The same, whose driver was killed half way; the same command again."""
    job = write_job(rl="record = true\neval_every = 3")
    run_cut_off("rl", job, STEPS)
    return job


@pytest.fixture(scope="module")
def replayed(write_job: Any, plain: Path) -> Path:
    """Learners alone, on what the first run recorded."""
    job = write_job(rl=f'replay = "{plain.parent}/run/rl/rollouts"')
    assert run_command(["rl", str(job)]) == 0
    return job


@pytest.fixture(scope="module")
def adapters(write_job: Any, ray_session: None) -> Path:
    """Adapters, a step ahead, with another loss, correction and average, and a KL penalty."""
    ahead = """
        max_staleness = 1
        loss = "gspo"
        importance_sampling = "truncated"
        loss_agg = "sequence"
        kl_coefficient = 0.01
    """
    lora = "lora = {rank = 4, targets = ['q_proj', 'down_proj']}"
    # Engines that run ahead may pass over every other version: long enough to hear of some.
    job = write_job(rl=ahead, learner=lora, steps=STEPS + 4)
    assert run_command(["rl", str(job)]) == 0
    return job


def numbers(job: Path, names: tuple[str, ...] = NUMBERS) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names} for row in rows(job)]


@pytest.mark.timeout(900)
def test_a_run_that_was_cut_off_repeats_to_the_bit(plain: Path, stopped: Path) -> None:
    assert [row["step"] for row in rows(plain)] == list(range(STEPS))
    assert numbers(stopped) == numbers(plain)
    assert are_equal(weights(stopped, "rl"), weights(plain, "rl"))


def test_groups_without_signal_are_replaced(plain: Path) -> None:
    assert sum(row["problems_dropped"] for row in rows(plain)) > 0
    for row in rows(plain):
        assert row["next_problem"] - row["first_problem"] == 4 + row["problems_dropped"]
    assert all(row["grad_norm"] > 0 for row in rows(plain))


def test_learners_learn_the_same_from_what_was_recorded(plain: Path, replayed: Path) -> None:
    assert numbers(replayed) == numbers(plain)


def test_generator_and_learner_agree_after_every_update(plain: Path, adapters: Path) -> None:
    for job, num_least in ((plain, STEPS - 1), (adapters, STEPS / 2)):
        gaps = [
            row["logprob_parity_max"] for row in rows(job) if row["logprob_parity_max"] is not None
        ]
        assert len(gaps) >= num_least and max(gaps) <= 1e-4


def test_held_out_problems_are_evaluated_on_the_way(plain: Path) -> None:
    found = {r["eval_version"]: r["pass_at_1"] for r in rows(plain) if "pass_at_1" in r}
    assert found.keys() == {0, 3, 6} and all(0 <= rate <= 1 for rate in found.values())
    best = plain.parent / "run" / "rl" / "best" / "model.safetensors"
    assert best.exists() == (max(found[3], found[6]) > found[0])
    assert not list((plain.parent / "run" / "rl" / "evaluated").iterdir())


def test_answers_are_kept_as_text(plain: Path) -> None:
    samples = sorted((plain.parent / "run" / "rl" / "samples").iterdir())
    assert len(samples) == STEPS
    text = samples[-1].read_text()
    assert f"step {STEPS - 1}, problem parity-" in text and "--- answer 3: reward " in text


def test_adapters_are_trained_and_merged(adapters: Path, tiny_model: Any) -> None:
    exported = weights(adapters, "rl")
    base = load_file(tiny_model(True) / "model.safetensors")
    changed = {name for name in base if not torch.equal(exported[name], base[name])}
    assert changed == {name for name in base if "q_proj" in name or "down_proj" in name}


def test_adapters_travel_alone(adapters: Path, plain: Path) -> None:
    alone, whole = (rows(job)[0]["published_mib_per_rank"] for job in (adapters, plain))
    assert alone < whole / 4


def test_no_answer_is_older_than_allowed(adapters: Path) -> None:
    steps = rows(adapters)
    assert max(row["staleness_max"] for row in steps) == 1
    assert all(0 < row["effective_sample_size"] <= 1 + 1e-6 for row in steps)
    assert max(row["reference_kl"] for row in steps) > 0
