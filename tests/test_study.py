"""A study of known scorecards, its report, and mistakes in its job."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pear_ray import report, study
from pear_ray.config import Job
from pear_ray.run import open_run
from pear_ray.study import compare, spreadsheet

# pass@1 before and after RL by seed: plain is ahead before, weighted after.
SCORES = {
    "plain": ([0.30, 0.32, 0.34], [0.40, 0.42, 0.44]),
    "weighted": ([0.20, 0.21, 0.25], [0.45, 0.45, 0.51]),
    # Without SFT it starts from the base, whose pass@1 is BASE.
    "none": (None, [0.28, 0.30, 0.32]),
}
# Ends with `cooperate`; used by some tests.
COOPERATING = {"both": ([0.22, 0.24, 0.26], [0.47, 0.50, 0.56])}
SETTINGS = {"none": {"sft": False}, "both": {"cooperate": {"method": "bridge"}}}
BASE = 0.25
SEEDS = (3, 5, 8)


def job_of(folder: Path, arms: tuple[str, ...] = tuple(SCORES), study_settings: dict[str, Any] | None = None) -> Job:
    return Job.model_validate(
        {
            "run": {"dir": str(folder)},
            "model": {"path": "some/model"},
            "tasks": [{"name": "countdown"}],
            "generator": {"max_new_tokens": 48, "max_model_len": 64},
            "evaluation": {"samples_per_problem": 4, "ks": [1]},
            "arms": [{"name": name, **SETTINGS.get(name, {})} for name in arms],
            "study": {"seeds": SEEDS, "hypothesis": "weighted ends higher", **(study_settings or {})},
        }
    )


def write_study(job: Job, folder: Path) -> None:
    """Write the outputs of all cells of a study and of its evaluation."""

    def card(label: str, value: float) -> dict[str, Any]:
        score = {"value": value, "low": value - 0.05, "high": value + 0.05}
        return {"path": label, "pass_at_k": {"1": score}, "parts": {}}

    cards = {"base": card("base", BASE)}
    for arm in job.arms:
        by_stage = (SCORES | COOPERATING)[arm.name]
        for stage, values in zip(("sft", arm.last_stage), by_stage, strict=True):
            for seed, value in zip(SEEDS, values or (), strict=bool(values)):
                label = f"{arm.name}@{seed}/{stage}"
                cards[label] = card(label, value)
        for seed in SEEDS:
            home = job.homes(folder)[f"{arm.name}@{seed}"]
            home.mkdir(parents=True)
            stages = {"sft": {"seconds": 10.0 + seed}} if by_stage[0] else {}
            stages |= {arm.last_stage: {"seconds": 100.0}}
            (home / "manifest.json").write_text(json.dumps({"stages": stages}))
            rows = [
                {"stage": "sft", "step": step, "time": 0.0, "nll": 2.0 - 0.1 * step + 0.01 * seed} for step in range(4)
            ]
            (home / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluate").mkdir()
    card = {"num_problems": 64, "samples_per_problem": 4, "temperature": 1.0, "seed": 0}
    document = card | {"checkpoints": cards, "differences": []}
    (folder / "evaluate" / "scorecard.json").write_text(json.dumps(document))


@pytest.fixture
def result(tmp_path: Path) -> dict[str, Any]:
    job = job_of(tmp_path)
    write_study(job, tmp_path)
    return compare(job, tmp_path)


def test_arms_are_means_over_seeds(result: dict[str, Any]) -> None:
    after = result["arms"]["plain"]["after RL"]["pass@1"]
    assert after["value"] == pytest.approx(0.42)
    # Standard error .02 / sqrt(3), and t of two degrees of freedom.
    assert after["standard_error"] == pytest.approx(0.011547, rel=1e-4)
    assert after["high"] - after["value"] == pytest.approx(4.302653 * 0.011547, rel=1e-4)
    assert after["by_seed"] == [0.40, 0.42, 0.44]
    assert result["arms"]["plain"]["seconds"] == {"sft": pytest.approx(10 + 16 / 3), "rl": 100.0}


def test_an_arm_without_sft_starts_from_the_base(result: dict[str, Any]) -> None:
    none = result["arms"]["none"]
    assert none["before RL"]["pass@1"]["by_seed"] == [BASE] * 3
    assert none["after RL"]["pass@1"]["by_seed"] == SCORES["none"][1]
    assert none["seconds"] == {"sft": 0.0, "rl": 100.0}


def test_an_arm_with_cooperate_is_compared_with_one_with_rl(tmp_path: Path) -> None:
    job = job_of(tmp_path, ("plain", "both"))
    write_study(job, tmp_path)
    result = compare(job, tmp_path)
    both = result["arms"]["both"]
    assert both["before RL"]["pass@1"]["by_seed"] == COOPERATING["both"][0]
    assert both["after RL"]["pass@1"]["by_seed"] == COOPERATING["both"][1]
    assert both["seconds"] == {"sft": pytest.approx(10 + 16 / 3), "cooperate": 100.0}
    (primary,) = result["primary"]
    assert (primary["arm"], primary["baseline"]) == ("both", "plain")
    assert primary["by_seed"] == pytest.approx([0.07, 0.08, 0.12])
    assert study.write_plan(job, tmp_path / "study" / "plan.json")["arms"] == {
        "plain": {"sft": {}, "rl": {}},
        "both": {"sft": {}, "rl": {}, "cooperate": {"method": "bridge"}},
    }
    assert study.is_evaluated(job, tmp_path)
    assert not study.is_evaluated(job_of(tmp_path, ("plain", "both", "none")), tmp_path)
    page = render(job, result)
    assert "both - plain +0.090" in page and "cooperate.method = bridge" in page


def test_arms_not_in_study_arms_are_left_out(tmp_path: Path) -> None:
    write_study(job_of(tmp_path), tmp_path)
    job = job_of(tmp_path, study_settings={"arms": ("plain", "none")})
    assert list(compare(job, tmp_path)["arms"]) == ["plain", "none"]
    assert list(study.write_plan(job, tmp_path / "study" / "plan.json")["arms"]) == ["plain", "none"]
    assert "weighted@3" not in job.homes(tmp_path) and "weighted" in job.homes(tmp_path)


def test_a_study_that_grows_keeps_its_earlier_plans(tmp_path: Path) -> None:
    path = tmp_path / "study" / "plan.json"
    small = job_of(tmp_path, study_settings={"arms": ("plain", "none")})
    plan = study.write_plan(small, path)
    assert plan == study.write_plan(small, path) == json.loads(path.read_text())
    assert plan["earlier"] == []
    grown = study.write_plan(job_of(tmp_path), path)
    (before,) = grown["earlier"]
    assert list(before["arms"]) == ["plain", "none"]
    assert list(grown["arms"]) == ["plain", "weighted", "none"]


def test_a_study_that_grows_is_evaluated_again(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    write_study(job, tmp_path)
    assert study.is_evaluated(job, tmp_path)
    more = job_of(tmp_path, study_settings={"seeds": (*SEEDS, 77)})
    assert not study.is_evaluated(more, tmp_path)


def test_differences_are_paired_over_seeds(result: dict[str, Any]) -> None:
    primary, _ = result["primary"]
    assert (primary["arm"], primary["baseline"], primary["when"]) == (
        "weighted", "plain", "after RL",
    )  # fmt: skip
    assert primary["by_seed"] == pytest.approx([0.05, 0.03, 0.07])
    assert primary["value"] == pytest.approx(0.05)
    before = next(row for row in result["differences"] if row["when"] == "before RL")
    assert before["value"] == pytest.approx(-0.1)


def test_reversed_orders_are_listed(result: dict[str, Any]) -> None:
    assert result["reversals"] == [
        {"better_before": "plain", "better_after": "weighted"},
        {"better_before": "none", "better_after": "weighted"},
    ]
    assert result["spearman"] == pytest.approx(-0.5)


def test_the_spreadsheet_has_a_row_per_arm_and_time(result: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(spreadsheet(result))))
    assert [(row["arm"], row["when"]) for row in rows] == [
        ("plain", "before RL"), ("plain", "after RL"),
        ("weighted", "before RL"), ("weighted", "after RL"),
        ("none", "before RL"), ("none", "after RL"),
    ]  # fmt: skip
    assert float(rows[3]["seed 8"]) == 0.51


def render(job: Job, result: dict[str, Any]) -> str:
    """Return the page of a study with this result."""
    (job.folder / "config.json").write_text(job.model_dump_json())
    document = result | {"plan": study.write_plan(job, job.folder / "study" / "plan.json")}
    (job.folder / "study" / "study.json").write_text(json.dumps(document))
    with open_run(job) as run:
        run.run_stage("report", report.run)
    return (job.folder / "report" / "index.html").read_text()


def test_the_report_shows_the_study_first(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    write_study(job, tmp_path)
    page = render(job, compare(job, tmp_path))
    headings = re.findall("<h2[^>]*>([^<]*)</h2>", page)
    assert headings[:2] == ["Study", "Results by arm"]
    assert "weighted ends higher" in page
    assert "plain is ahead of weighted before RL and behind it after" in page
    assert "weighted - plain +0.050" in page
    assert "One seed" not in page
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert markdown.startswith("| arm")


def test_each_cell_has_its_own_folder_and_seed(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    cells = [job.of_arm(arm, seed) for arm in job.arms for seed in SEEDS]
    assert len({cell.run.dir for cell in cells}) == 9
    assert [cell.run.seed for cell in cells] == 3 * [*SEEDS]
    assert all(not cell.arms and not cell.study.seeds for cell in cells)
    assert job.of_arm(job.arms[0]).run.seed == job.run.seed
    assert set(job.homes(tmp_path)) == {
        "", *SCORES, *(f"{a}@{s}" for a in SCORES for s in SEEDS),
    }  # fmt: skip


MISTAKES = {
    "one arm": ({}, "arms: expected at least two to compare, got 1"),
    "no seeds": ({"seeds": ()}, r"study.seeds: expected at least two, got \[\]"),
    "one seed": ({"seeds": (1,)}, r"study.seeds: expected at least two, got \[1\]"),
    "a seed twice": ({"seeds": (1, 1)}, "expected each one once"),
    "unknown arm": ({"arms": ("other", "plain")}, r"study.arms: .* got \['other'\]"),
    "one of its arms": ({"arms": ("plain",)}, "arms: expected at least two to compare, got 1"),
    "baseline not in study.arms": (
        {"arms": ("plain", "none"), "baseline": "weighted"},
        r"study.baseline: expected one of \['plain', 'none'\], got 'weighted'",
    ),
    "unknown baseline": ({"baseline": "other"}, "study.baseline: .* got 'other'"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_refused(mistake: Any, tmp_path: Path) -> None:
    settings, message = mistake
    with pytest.raises(ValueError, match=message):
        arms = ("plain",) if not settings else tuple(SCORES)
        job = job_of(tmp_path, arms, settings)
        with open_run(job) as run:
            run.run_stage("study", study.run)
    assert not (tmp_path / "study").exists()
