"""Stage `cooperate` on real engines, learners and a scored corpus: every method runs, the ends of
lambda are `rl` and `sft`, and a run that was cut off repeats to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pear_ray.__main__ import run_command
from tests.rl.parity_corpus import write_corpus
from tests.rl.runs import are_equal, rows, run_cut_off, weights

STEPS = 10
TRACES_PER_STEP = 6
MAX_PROBE_GAP = 1e-4
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
examples_per_step = {traces}
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
name = "tests.rl.parity:Parity"
"""


@pytest.fixture(scope="module")
def write_job(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a job file in a folder of its own, with [cooperate] and further lines in [rl]."""
    model = tiny_model(False)
    traces = tmp_path_factory.mktemp("traces")
    write_corpus(traces / "many", model)
    write_corpus(traces / "few", model, STEPS * TRACES_PER_STEP)

    def write(cooperate: str = "", rl: str = "", corpus: str = "few") -> Path:
        folder = tmp_path_factory.mktemp("cooperate")
        text = JOB.format(
            folder=folder,
            model=model,
            corpus=traces / corpus,
            steps=STEPS,
            traces=TRACES_PER_STEP,
            max_gap=MAX_PROBE_GAP,
            rl=rl,
        )
        (folder / "job.toml").write_text(text + (f"[cooperate]\n{cooperate}" if cooperate else ""))
        return folder / "job.toml"

    return write


@pytest.fixture(scope="module")
def performed(write_job: Any, ray_session: None) -> Any:
    """Runs a stage on a new job and returns its file."""

    def run_stage(stage: str, *settings: str, **more: str) -> Path:
        job: Path = write_job(*settings, **more)
        assert run_command([stage, str(job)]) == 0
        return job

    return run_stage


@pytest.fixture(scope="module")
def recorded(performed: Any) -> Path:
    """A run of stage `rl`, recorded."""
    job: Path = performed("rl", rl="record = true")
    return job


BRIDGE = 'method = {type = "bridge", refresh_steps = 4, lora = {rank = 4}}'


@pytest.fixture(scope="module")
def bridge(performed: Any) -> Path:
    """A run of BRIDGE in one go."""
    job: Path = performed("cooperate", BRIDGE)
    return job


@pytest.mark.timeout(900)
def test_lambda_1_is_reinforcement_learning(performed: Any, recorded: Path) -> None:
    replay = f'replay = "{recorded.parent}/run/rl/rollouts"'
    replayed = performed("cooperate", "method = {type = 'sum', rl_weight = 1.0}", rl=replay)
    assert are_equal(weights(replayed, "cooperate"), weights(recorded, "rl"))


@pytest.mark.timeout(900)
def test_lambda_0_is_supervised_fine_tuning(performed: Any) -> None:
    ours = performed("cooperate", "method = {type = 'sum', rl_weight = 0.0}")
    theirs = performed("sft")
    assert len(rows(theirs)) == STEPS
    assert are_equal(weights(ours, "cooperate"), weights(theirs, "sft"))


@pytest.mark.timeout(900)
def test_bridge_tells_what_the_traces_gain(bridge: Path) -> None:
    found = rows(bridge)
    assert [row["step"] for row in found] == list(range(STEPS))
    # Policy and shadow are one before the first step, and are made one again at the fifth.
    gains = [abs(row["cooperative_gain"]) for row in found]
    assert gains[0] < 1e-6 < min(gains[1:4])
    assert all(row["sft_tokens"] > 0 and row["pass_rate"] >= 0 for row in found)
    gaps = [row["logprob_parity_max"] for row in found if row["logprob_parity_max"] is not None]
    assert len(gaps) >= STEPS - 2 and max(gaps) <= MAX_PROBE_GAP


@pytest.mark.timeout(900)
def test_bridge_that_was_cut_off_repeats_to_the_bit(bridge: Path, write_job: Any) -> None:
    job = write_job(BRIDGE)
    run_cut_off("cooperate", job, STEPS)
    assert [row["step"] for row in rows(job)] == list(range(STEPS))
    assert are_equal(weights(job, "cooperate"), weights(bridge, "cooperate"))


@pytest.mark.timeout(900)
def test_trapo_goes_on_from_traces(performed: Any) -> None:
    groups = (
        "prefix_groups = [2, 1, 1], prefix_fracs = [0.0, 0.5, 1.0],"
        " prefix_returns = [0.0, 0.9, 0.9]"
    )
    method = f'method = {{type = "trapo", {groups}}}'
    job = performed("cooperate", method, rl="record = true", corpus="many")
    found = rows(job)
    assert len(found) == STEPS and max(row["staleness_max"] for row in found) == 0
    guided = [row for row in found if row.get("prefix_frac")]
    assert guided and all(row["sft_tokens"] > 0 for row in guided)
    recordings = sorted((job.parent / "run" / "cooperate" / "rollouts").glob("*.parquet"))
    answers = [row for path in recordings for row in pq.read_table(path).to_pylist()]
    assert len(answers) == STEPS * 16
    whole = [row for row in answers if row["trace_ids"] and not row["token_ids"]]
    continued = [row for row in answers if row["trace_ids"] and row["token_ids"]]
    # Right traces are right answers.
    assert whole and all(row["correct"] for row in whole)
    assert continued
    assert all(len(row["trace_ids"]) + len(row["token_ids"]) <= 8 for row in answers)


@pytest.mark.timeout(900)
def test_traces_of_failed_problems_leave_alone_what_rl_moved(performed: Any) -> None:
    job = performed(
        "cooperate",
        'method = {type = "alternate", frozen_frac = 0.1}\ntraces = "failed"\n'
        "failed_pass_rate = 0.5\nentropy_top_frac = 0.4",
        corpus="many",
    )
    found = rows(job)
    learned = [row for row in found if row.get("sft_tokens")]
    assert len(found) == STEPS and learned
    assert all(0.09 < row["frozen_frac"] < 0.2 for row in learned)
