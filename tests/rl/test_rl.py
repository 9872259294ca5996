"""Stage `rl` on real engines and learners: an interrupted on-policy run samples and learns what an uninterrupted one
does, to the bit; adapters can be trained off-policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pear_ray.__main__ import run_command
from pear_ray.rl.recording import read_batch
from tests.rl.fixtures import STEPS
from tests.rl.runs import are_equal, rows, weights

pytestmark = pytest.mark.cluster

# Metrics that do not depend on the speed of the machine.
METRICS = (
    "loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "pass_rate", "first_problem",
    "next_problem", "problems_dropped", "ratio_mean", "completions_clipped_ratio",
)  # fmt: skip


@pytest.fixture(scope="module")
def replayed(on_policy_job: Any, recorded_rl: Path) -> Path:
    """Learners alone and uninterrupted, on the recorded rollouts."""
    job: Path = on_policy_job(rl={"replay": f"{recorded_rl.parent}/run/rl/rollouts"})
    assert run_command(["rl", str(job)]) == 0
    return job


@pytest.fixture(scope="module")
def adapters(on_policy_job: Any, ray_session: None) -> Path:
    """Adapters, one step off-policy, with other loss settings and a KL penalty."""
    ahead = {
        "max_staleness": 1,
        "loss": "gspo",
        "importance_sampling": "truncated",
        "loss_agg": "sequence",
        "kl_coefficient": 0.01,
        # Engines may skip every other version: long enough to check some.
        "steps": STEPS + 4,
    }
    job: Path = on_policy_job(rl=ahead, learner={"lora": {"rank": 4, "targets": ["q_proj", "down_proj"]}})
    assert run_command(["rl", str(job)]) == 0
    return job


def metrics(job: Path, names: tuple[str, ...] = METRICS) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names} for row in rows(job)]


@pytest.mark.timeout(900)
def test_an_interrupted_run_learns_what_an_uninterrupted_one_does(recorded_rl: Path, replayed: Path) -> None:
    assert [row["step"] for row in rows(recorded_rl)] == list(range(STEPS))
    assert metrics(replayed) == metrics(recorded_rl)
    assert are_equal(weights(replayed, "rl"), weights(recorded_rl, "rl"))


def test_an_interrupted_run_samples_the_same_batches_again(recorded_rl: Path) -> None:
    before, after = recorded_rl.parent / "before", recorded_rl.parent / "run" / "rl" / "rollouts"
    names = [path.name for path in before.iterdir()]
    again = [name for name in names if (before / name).stat().st_mtime_ns != (after / name).stat().st_mtime_ns]
    assert again
    for step in range(len(names)):
        assert read_batch(after, step) == read_batch(before, step)


def test_groups_of_equal_rewards_are_replaced(recorded_rl: Path) -> None:
    assert sum(row["problems_dropped"] for row in rows(recorded_rl)) > 0
    for row in rows(recorded_rl):
        assert row["next_problem"] - row["first_problem"] == 4 + row["problems_dropped"]
    assert all(row["grad_norm"] > 0 for row in rows(recorded_rl))


@pytest.mark.parametrize(
    ("run", "least"), [("recorded_rl", STEPS - 2), pytest.param("adapters", STEPS / 2, marks=pytest.mark.nightly)]
)
def test_log_probs_of_engines_and_learner_agree(request: pytest.FixtureRequest, run: str, least: float) -> None:
    job = request.getfixturevalue(run)
    gaps = [row["logprob_parity_max"] for row in rows(job) if row["logprob_parity_max"] is not None]
    assert len(gaps) >= least and max(gaps) <= 1e-4


def test_held_out_problems_are_evaluated_and_the_best_weights_kept(recorded_rl: Path) -> None:
    found = {r["eval_version"]: r["pass_at_1"] for r in rows(recorded_rl) if "pass_at_1" in r}
    assert found.keys() == {0, 3, 6} and all(0 <= rate <= 1 for rate in found.values())
    best = recorded_rl.parent / "run" / "rl" / "best" / "model.safetensors"
    assert best.exists() == (max(found[3], found[6]) > found[0])
    assert not list((recorded_rl.parent / "run" / "rl" / "evaluated").iterdir())


def test_samples_are_written_as_text(recorded_rl: Path) -> None:
    samples = sorted((recorded_rl.parent / "run" / "rl" / "samples").iterdir())
    assert len(samples) == STEPS
    text = samples[-1].read_text()
    assert f"step {STEPS - 1}, problem parity-" in text and "--- completion 3: reward " in text


@pytest.mark.nightly
def test_adapters_are_trained_and_merged(adapters: Path, tiny_model: Any) -> None:
    exported = weights(adapters, "rl")
    base = load_file(tiny_model(True) / "model.safetensors")
    changed = {name for name in base if not torch.equal(exported[name], base[name])}
    assert changed == {name for name in base if "q_proj" in name or "down_proj" in name}


@pytest.mark.nightly
def test_only_adapters_are_published(adapters: Path, recorded_rl: Path) -> None:
    alone, whole = (rows(job)[0]["published_mib_per_rank"] for job in (adapters, recorded_rl))
    assert alone < whole / 4


@pytest.mark.nightly
def test_staleness_is_bounded(adapters: Path) -> None:
    steps = rows(adapters)
    assert max(row["staleness_max"] for row in steps) == 1
    assert all(0 < row["effective_sample_size"] <= 1 + 1e-6 for row in steps)
    assert max(row["reference_kl"] for row in steps) > 0
