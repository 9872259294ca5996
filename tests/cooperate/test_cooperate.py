"""Stage `cooperate` with real engines, learners and a scored corpus: each method runs, the extremes of lambda equal
`rl` and `sft`, and an interrupted run repeats to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pear_ray.__main__ import run_command
from pear_ray.rl.recording import read_batch
from tests.rl.parity_corpus import write_corpus
from tests.rl.runs import are_equal, rows, run_cut_off, weights

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]

STEPS = 10
DEMONSTRATIONS_PER_STEP = 6
MAX_LOGPROB_GAP = 1e-4
JOB = """
[run]
dir = "{folder}/run"
seed = 7
[model]
path = "{model}"
dtype = "float32"
[corpus]
scored_path = "{corpus}"
[sft]
examples_per_step = {demonstrations}
schedule = "constant"
learning_rate = 1e-3
warmup_fraction = 0.2
[rl]
steps = {steps}
prompts_per_step = 4
group_size = 4
learning_rate = 1e-3
warmup_fraction = 0.2
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
[weights]
max_logprob_gap = {max_gap}
[rewards]
processes = 1
[[tasks]]
name = "tests.rl.parity_task:Parity"
"""


@pytest.fixture(scope="module")
def write_job(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write a job file to a new folder, with these lines in [cooperate] and [rl]."""
    model = tiny_model(False)
    scored = tmp_path_factory.mktemp("scored")
    write_corpus(scored / "many", model)
    write_corpus(scored / "few", model, STEPS * DEMONSTRATIONS_PER_STEP)

    def write(cooperate: str = "", rl: str = "", corpus: str = "few") -> Path:
        folder = tmp_path_factory.mktemp("cooperate")
        text = JOB.format(
            folder=folder,
            model=model,
            corpus=scored / corpus,
            steps=STEPS,
            demonstrations=DEMONSTRATIONS_PER_STEP,
            max_gap=MAX_LOGPROB_GAP,
            rl=rl,
        )
        (folder / "job.toml").write_text(text + (f"[cooperate]\n{cooperate}" if cooperate else ""))
        return folder / "job.toml"

    return write


@pytest.fixture(scope="module")
def run_stage(write_job: Any, ray_session: None) -> Any:
    """Run a stage on a new job; return its file."""

    def run(stage: str, *settings: str, **more: str) -> Path:
        job: Path = write_job(*settings, **more)
        assert run_command([stage, str(job)]) == 0
        return job

    return run


@pytest.fixture(scope="module")
def recorded_rl(run_stage: Any) -> Path:
    """A recorded run of stage `rl`."""
    job: Path = run_stage("rl", rl="record = true")
    return job


BRIDGE = 'method = {type = "bridge", refresh_steps = 4, lora = {rank = 4}}'


@pytest.fixture(scope="module")
def bridge(run_stage: Any) -> Path:
    """An uninterrupted run of BRIDGE."""
    job: Path = run_stage("cooperate", BRIDGE)
    return job


@pytest.mark.timeout(900)
def test_lambda_1_equals_rl(run_stage: Any, recorded_rl: Path) -> None:
    replay = f'replay = "{recorded_rl.parent}/run/rl/rollouts"'
    replayed = run_stage("cooperate", "method = {type = 'sum', rl_weight = 1.0}", rl=replay)
    assert are_equal(weights(replayed, "cooperate"), weights(recorded_rl, "rl"))


@pytest.mark.timeout(900)
def test_lambda_0_equals_sft(run_stage: Any) -> None:
    job = run_stage("cooperate", "method = {type = 'sum', rl_weight = 0.0}")
    sft_job = run_stage("sft")
    assert len(rows(sft_job)) == STEPS
    assert are_equal(weights(job, "cooperate"), weights(sft_job, "sft"))


@pytest.mark.timeout(900)
def test_bridge_reports_the_cooperative_gain(bridge: Path) -> None:
    metrics = rows(bridge)
    assert [row["step"] for row in metrics] == list(range(STEPS))
    # Policy and shadow are equal before the first step, and again before the fifth.
    gains = [abs(row["cooperative_gain"]) for row in metrics]
    assert gains[0] < 1e-6 < min(gains[1:4])
    assert all(row["sft_tokens"] > 0 and row["pass_rate"] >= 0 for row in metrics)
    gaps = [row["logprob_parity_max"] for row in metrics if row["logprob_parity_max"] is not None]
    assert len(gaps) >= STEPS - 2 and max(gaps) <= MAX_LOGPROB_GAP


@pytest.mark.timeout(900)
def test_bridge_repeats_to_the_bit_after_an_interruption(bridge: Path, write_job: Any) -> None:
    job = write_job(BRIDGE)
    run_cut_off("cooperate", job, STEPS)
    assert [row["step"] for row in rows(job)] == list(range(STEPS))
    assert are_equal(weights(job, "cooperate"), weights(bridge, "cooperate"))


@pytest.mark.timeout(900)
def test_trapo_continues_prefixes(run_stage: Any) -> None:
    method = (
        'method = {type = "trapo", prefix_groups = [2, 1, 1], prefix_fracs = [0.0, 0.5, 1.0],'
        " prefix_returns = [0.0, 0.9, 0.9]}"
    )
    job = run_stage("cooperate", method, rl="record = true", corpus="many")
    metrics = rows(job)
    assert len(metrics) == STEPS and max(row["staleness_max"] for row in metrics) == 0
    with_prefix = [row for row in metrics if row.get("prefix_frac")]
    assert with_prefix and all(row["sft_tokens"] > 0 for row in with_prefix)
    folder = job.parent / "run" / "cooperate" / "rollouts"
    groups = [group for step in range(STEPS) for group in read_batch(folder, step).groups]
    graded = [pair for g in groups for pair in zip(g.completions, g.grades, strict=True)]
    assert len(graded) == STEPS * 16
    whole = [grade for c, grade in graded if c.prefix_ids and not c.token_ids]
    # The corpus is correct.
    assert whole and all(grade.correct for grade in whole)
    assert any(c.prefix_ids and c.token_ids for c, _ in graded)
    assert all(c.num_tokens <= 8 for c, _ in graded)


@pytest.mark.timeout(900)
def test_alternate_freezes_parameters_on_steps_with_failed_prompts(run_stage: Any) -> None:
    job = run_stage(
        "cooperate",
        'method = {type = "alternate", frozen_frac = 0.1}\ntraces = "failed"\n'
        "failed_pass_rate = 0.5\nentropy_top_frac = 0.4",
        corpus="many",
    )
    metrics = rows(job)
    with_sft = [row for row in metrics if row.get("sft_tokens")]
    assert len(metrics) == STEPS and with_sft
    assert all(0.09 < row["frozen_frac"] < 0.2 for row in with_sft)
