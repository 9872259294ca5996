"""The whole pipeline with real engines, on a job of minutes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pear_ray.config import Job, read_job
from tests.tiny_chain import drive

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]

CLUSTER = Path(__file__).parents[1] / "cluster"


def rows(folder: Path, stage: str) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["stage"] == stage]


def stages(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    return json.loads(path.read_text())["stages"] if path.exists() else {}


def start_times(entries: dict[str, Any]) -> dict[str, float]:
    """When each stage started, except those that run every time."""
    return {s: e["started"] for s, e in entries.items() if s not in ("rank", "report", "pipeline")}


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Path:
    """A finished run."""
    return tiny_run


@pytest.mark.timeout(1200)
def test_every_stage_is_done_and_has_its_outputs(run: Path) -> None:
    assert {s for s, e in stages(run).items() if e["state"] == "done"} >= {
        "pretrain", "sample", "score", "evaluate", "rank", "report", "pipeline",
    }  # fmt: skip
    for name in ("scored/rejected.jsonl", "evaluate/attempts.parquet", "report/index.html"):
        assert (run / name).exists()
    for stage in ("sft", "rl"):
        assert (run / "arms" / "pear" / stage / "export" / "model.safetensors").exists()
    assert not list(run.rglob("*.partial"))


def test_each_step_is_logged_once(run: Path) -> None:
    sft, rl = (rows(run / "arms" / "pear", stage) for stage in ("sft", "rl"))
    assert [row["step"] for row in sft] == list(range(len(sft))) and len(sft) >= 16
    assert [row["step"] for row in rl] == list(range(8))


def test_scores_match_recorded_logprobs(run: Path) -> None:
    """One engine scored both sources, each under its own model."""
    sources = stages(run)["score"]["facts"]["sources"]
    gaps = {source: numbers["recorded_gap_max"] for source, numbers in sources.items()}
    assert gaps.keys() == {"teacher_plain", "teacher_cipher"} and max(gaps.values()) <= 1e-4


def test_scores_match_the_trainers_forward_pass(run: Path) -> None:
    """Models with an output head of their own; the engine reads their rows in chunks."""
    for numbers in stages(run)["score"]["facts"]["calibration"].values():
        assert numbers["rows"] >= 20 and 0 < numbers["max_gap"] <= 1e-4


def test_engine_and_trainer_agree_after_every_update(run: Path) -> None:
    steps = rows(run / "arms" / "pear", "rl")
    # The parity check uses answers sampled with the first weights, which have none yet.
    gaps = [row["logprob_parity_max"] for row in steps[1:]]
    assert max(gaps) <= 1e-4
    assert any(row["grad_norm"] > 0 for row in steps), "no step changed the weights"


def test_weights_are_logged_by_source(run: Path) -> None:
    first = rows(run / "arms" / "pear", "sft")[0]
    assert set(first["first_weight_by_source"]) == {"teacher_plain", "teacher_cipher"}
    assert 0 < first["effective_sample_size"] < 1


def test_every_example_is_scored_with_one_logprob_per_token(run: Path) -> None:
    scored = [r for f in (run / "scored").glob("*.parquet") for r in pq.read_table(f).to_pylist()]
    examples = pq.read_table(run / "sample").to_pylist()
    assert sorted(r["example_id"] for r in scored) == sorted(e["example_id"] for e in examples)
    assert all(len(r["response_ids"]) == len(r["behavior_logprobs"]) > 0 for r in scored)
    assert {(r["source"], Path(r["behavior_model"]).name) for r in scored} == {
        ("teacher_plain", "teacher_plain"), ("teacher_cipher", "teacher_cipher"),
    }  # fmt: skip


def test_scorecard_covers_all_checkpoints_on_the_same_problems(run: Path) -> None:
    card = json.loads((run / "evaluate" / "scorecard.json").read_text())
    assert set(card["checkpoints"]) == {"base", "pear/sft", "pear/rl"}
    attempts = pq.read_table(run / "evaluate" / "attempts.parquet").to_pylist()
    problems = {c: {a["problem_id"] for a in attempts if a["checkpoint"] == c} for c in card["checkpoints"]}
    assert len({frozenset(p) for p in problems.values()}) == 1
    assert len(attempts) == 3 * 8 * 8


def test_every_panel_and_alert_has_its_metrics(run: Path, scraped_metrics: set[str]) -> None:
    """Except those of events, which this run has none of."""
    files = ("grafana/pear_ray.json", "prometheus/rules.yml")
    texts = [(CLUSTER / file).read_text() for file in files]
    names = {name for text in texts for name in re.findall(r"\bray_[a-z_0-9]+", text)}
    rare = {name for name in names if "_event" in name}
    assert len(names) > 50
    assert names - rare <= scraped_metrics


def test_running_again_repeats_nothing(run: Path) -> None:
    before = [(run / name).read_text() for name in ("manifest.json", "metrics.jsonl")]
    assert drive(run).wait(timeout=120) == 0
    assert (run / "metrics.jsonl").read_text() == before[1]
    assert start_times(stages(run)) == start_times(json.loads(before[0])["stages"])


def test_the_config_of_an_arm_is_a_valid_job(run: Path) -> None:
    job = read_job(run / "arms" / "pear" / "config.json")
    assert isinstance(job, Job) and job.sft.level == "token"
