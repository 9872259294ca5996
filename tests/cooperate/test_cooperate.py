"""Stage `cooperate` with real engines, learners and a scored corpus: each method runs, the extremes of lambda equal
`rl` and `sft`, and an interrupted run repeats to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pear_ray.__main__ import run_command
from pear_ray.rl.recording import read_batch
from pear_ray.rl.scheduler import StepBatch
from tests.rl.fixtures import ON_POLICY
from tests.rl.parity_corpus import write_corpus
from tests.rl.runs import are_equal, rows, run_cut_off, weights
from tests.tiny_job import tiny_job

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]

STEPS = 10
DEMONSTRATIONS_PER_STEP = 6
MAX_LOGPROB_GAP = 1e-4
WARMUP = {"learning_rate": 1e-3, "warmup_fraction": 0.2}
RL = {"steps": STEPS, "prompts_per_step": 4, "group_size": 4, **WARMUP}
SFT = {"examples_per_step": DEMONSTRATIONS_PER_STEP, "schedule": "constant", **WARMUP}


@pytest.fixture(scope="module")
def write_job(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write a job with these keys in [rl] and [cooperate]."""
    model = tiny_model(False)
    scored = tmp_path_factory.mktemp("scored")
    write_corpus(scored / "many", model)
    write_corpus(scored / "few", model, STEPS * DEMONSTRATIONS_PER_STEP)

    def write(corpus: str = "few", rl: dict[str, Any] = RL, model: Path = model, **cooperate: Any) -> Path:
        sections = {name: ON_POLICY[name] for name in ("run", "learner")}
        sections |= {"corpus": {"scored_path": str(scored / corpus)}, "sft": SFT, "rl": rl}
        sections |= {"cooperate": cooperate} if cooperate else {}
        return tiny_job(tmp_path_factory.mktemp("cooperate"), model, **sections)

    return write


@pytest.fixture(scope="module")
def run_stage(write_job: Any, ray_session: None) -> Any:
    """Run a stage on a new job; return its file."""

    def run(stage: str, **settings: Any) -> Path:
        job: Path = write_job(**settings)
        assert run_command([stage, str(job)]) == 0
        return job

    return run


BRIDGE = {"type": "bridge", "refresh_steps": 4, "lora": {"rank": 4}}


@pytest.fixture(scope="module")
def bridge(write_job: Any, ray_session: None) -> Path:
    """A recorded run of BRIDGE that was interrupted and resumed."""
    job: Path = write_job(method=BRIDGE, rl=RL | {"record": True})
    run_cut_off("cooperate", job, STEPS)
    return job


@pytest.mark.timeout(900)
def test_lambda_1_equals_rl(run_stage: Any, recorded_rl: Path, tiny_model: Any) -> None:
    rl = ON_POLICY["rl"] | {"replay": f"{recorded_rl.parent}/run/rl/rollouts"}
    replayed = run_stage("cooperate", rl=rl, model=tiny_model(True), method={"type": "sum", "rl_weight": 1.0})
    assert are_equal(weights(replayed, "cooperate"), weights(recorded_rl, "rl"))


@pytest.mark.timeout(900)
def test_lambda_0_equals_sft(run_stage: Any, bridge: Path) -> None:
    rl = RL | {"replay": f"{bridge.parent}/run/cooperate/rollouts"}
    job = run_stage("cooperate", rl=rl, method={"type": "sum", "rl_weight": 0.0})
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
def test_an_interrupted_bridge_learns_what_an_uninterrupted_one_does(bridge: Path, run_stage: Any) -> None:
    replay = f"{bridge.parent}/run/cooperate/rollouts"
    uninterrupted = run_stage("cooperate", method=BRIDGE, rl=RL | {"replay": replay})
    assert are_equal(weights(uninterrupted, "cooperate"), weights(bridge, "cooperate"))
    for path in (bridge.parent / "before").iterdir():
        step = int(path.stem.removeprefix("step-"))
        assert without_arrays(read_batch(path.parent, step)) == without_arrays(read_batch(Path(replay), step))


def without_arrays(batch: StepBatch) -> tuple[Any, ...]:
    """Return what a batch holds, comparable."""
    rows = [
        (one.origin, one.token_ids.tolist(), one.sampled_logprobs.tolist(), one.coefficients.tolist())
        for one in batch.demonstrations
    ]
    return batch.groups, batch.first_problem, batch.next_problem, batch.dropped, rows


@pytest.mark.timeout(900)
def test_trapo_continues_prefixes(run_stage: Any) -> None:
    method = {
        "type": "trapo",
        "prefix_groups": [2, 1, 1],
        "prefix_fracs": [0.0, 0.5, 1.0],
        "prefix_returns": [0.0, 0.9, 0.9],
    }
    job = run_stage("cooperate", corpus="many", method=method, rl=RL | {"record": True})
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
        corpus="many",
        method={"type": "alternate", "frozen_frac": 0.1},
        traces="failed",
        failed_pass_rate=0.5,
        entropy_top_frac=0.4,
    )
    metrics = rows(job)
    with_sft = [row for row in metrics if row.get("sft_tokens")]
    assert len(metrics) == STEPS and with_sft
    # The mean over parameters of the share that is frozen: less than .1 of one with few changes, and more while all of
    # its elements have changed alike, as in AdamW's first step.
    assert all(0.05 < row["frozen_frac"] < 1 for row in with_sft)
