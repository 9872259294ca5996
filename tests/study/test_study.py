"""The study's table from scorecards whose numbers are known, and what a study must not be."""

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
from pear_ray.study.comparison import comparison, spreadsheet

# pass@1 before and after RL, by arm and seed: plain is ahead before, weighted after.
SCORES = {
    "plain": ([0.30, 0.32, 0.34], [0.40, 0.42, 0.44]),
    "weighted": ([0.20, 0.21, 0.25], [0.45, 0.45, 0.51]),
    # Without SFT: before RL it is the base, whose pass@1 is BASE.
    "none": (None, [0.28, 0.30, 0.32]),
}
# One that ends with `cooperate` takes part in some of the tests.
BOTH = {"both": ([0.22, 0.24, 0.26], [0.47, 0.50, 0.56])}
SETTINGS = {"none": {"sft": False}, "both": {"cooperate": {"method": "bridge"}}}
BASE = 0.25
SEEDS = (3, 5, 8)


def job_of(
    folder: Path, arms: tuple[str, ...] = tuple(SCORES), of_study: dict[str, Any] | None = None
) -> Job:
    return Job.model_validate(
        {
            "run": {"dir": str(folder)},
            "model": {"path": "some/model"},
            "tasks": [{"name": "countdown"}],
            "generator": {"max_new_tokens": 48, "max_model_len": 64},
            "evaluation": {"samples_per_problem": 4, "ks": [1]},
            "arms": [{"name": name, **SETTINGS.get(name, {})} for name in arms],
            "study": {"seeds": SEEDS, "hypothesis": "weighted ends higher", **(of_study or {})},
        }
    )


def write(job: Job, folder: Path) -> None:
    """What the cells of a study and its evaluation leave."""

    def card(label: str, value: float) -> dict[str, Any]:
        score = {"value": value, "low": value - 0.05, "high": value + 0.05}
        return {"path": label, "pass_at_k": {"1": score}, "parts": {}}

    cards = {"base": card("base", BASE)}
    for arm in job.arms:
        by_stage = (SCORES | BOTH)[arm.name]
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
                {"stage": "sft", "step": step, "time": 0.0, "nll": 2.0 - 0.1 * step + 0.01 * seed}
                for step in range(4)
            ]
            (home / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluate").mkdir()
    card = {"num_problems": 64, "samples_per_problem": 4, "temperature": 1.0, "seed": 0}
    document = card | {"checkpoints": cards, "differences": []}
    (folder / "evaluate" / "scorecard.json").write_text(json.dumps(document))


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Any]:
    job = job_of(tmp_path)
    write(job, tmp_path)
    return comparison(job, tmp_path)


def test_arms_are_means_over_seeds(found: dict[str, Any]) -> None:
    after = found["arms"]["plain"]["after RL"]["pass@1"]
    assert after["value"] == pytest.approx(0.42)
    # Standard error .02 / sqrt(3), and t of two degrees of freedom.
    assert after["standard_error"] == pytest.approx(0.011547, rel=1e-4)
    assert after["high"] - after["value"] == pytest.approx(4.302653 * 0.011547, rel=1e-4)
    assert after["by_seed"] == [0.40, 0.42, 0.44]
    assert found["arms"]["plain"]["seconds"] == {"sft": pytest.approx(10 + 16 / 3), "rl": 100.0}


def test_an_arm_without_sft_starts_from_the_base(found: dict[str, Any]) -> None:
    none = found["arms"]["none"]
    assert none["before RL"]["pass@1"]["by_seed"] == [BASE] * 3
    assert none["after RL"]["pass@1"]["by_seed"] == SCORES["none"][1]
    assert none["seconds"] == {"sft": 0.0, "rl": 100.0}


def test_an_arm_that_cooperates_is_compared_with_one_that_does_not(tmp_path: Path) -> None:
    job = job_of(tmp_path, ("plain", "both"))
    write(job, tmp_path)
    found = comparison(job, tmp_path)
    both = found["arms"]["both"]
    assert both["before RL"]["pass@1"]["by_seed"] == BOTH["both"][0]
    assert both["after RL"]["pass@1"]["by_seed"] == BOTH["both"][1]
    assert both["seconds"] == {"sft": pytest.approx(10 + 16 / 3), "cooperate": 100.0}
    (primary,) = found["primary"]
    assert (primary["arm"], primary["baseline"]) == ("both", "plain")
    assert primary["by_seed"] == pytest.approx([0.07, 0.08, 0.12])
    assert study.plan_of(job)["arms"] == {
        "plain": {"sft": {}, "rl": {}},
        "both": {"sft": {}, "rl": {}, "cooperate": {"method": "bridge"}},
    }
    assert study.is_evaluated(job, tmp_path)
    assert not study.is_evaluated(job_of(tmp_path, ("plain", "both", "none")), tmp_path)
    page = reported(job, found)
    assert "both - plain +0.090" in page and "cooperate.method = bridge" in page


def test_arms_that_are_not_named_take_no_part(tmp_path: Path) -> None:
    write(job_of(tmp_path), tmp_path)
    job = job_of(tmp_path, of_study={"arms": ("plain", "none")})
    assert list(comparison(job, tmp_path)["arms"]) == ["plain", "none"]
    assert list(study.plan_of(job)["arms"]) == ["plain", "none"]
    assert "weighted@3" not in job.homes(tmp_path) and "weighted" in job.homes(tmp_path)


def test_a_study_that_grows_keeps_the_plans_it_had(tmp_path: Path) -> None:
    path = tmp_path / "study" / "plan.json"
    small = job_of(tmp_path, of_study={"arms": ("plain", "none")})
    noted = study.noted_plan(small, path)
    assert noted == study.noted_plan(small, path) == json.loads(path.read_text())
    assert noted["earlier"] == []
    grown = study.noted_plan(job_of(tmp_path), path)
    (before,) = grown["earlier"]
    assert list(before["arms"]) == ["plain", "none"]
    assert list(grown["arms"]) == ["plain", "weighted", "none"]


def test_a_study_that_has_grown_is_evaluated_again(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    write(job, tmp_path)
    assert study.is_evaluated(job, tmp_path)
    more = job_of(tmp_path, of_study={"seeds": (*SEEDS, 77)})
    assert not study.is_evaluated(more, tmp_path)


def test_differences_are_paired_over_seeds(found: dict[str, Any]) -> None:
    primary, _ = found["primary"]
    assert (primary["arm"], primary["baseline"], primary["when"]) == (
        "weighted", "plain", "after RL",
    )  # fmt: skip
    assert primary["by_seed"] == pytest.approx([0.05, 0.03, 0.07])
    assert primary["value"] == pytest.approx(0.05)
    before = next(row for row in found["differences"] if row["when"] == "before RL")
    assert before["value"] == pytest.approx(-0.1)


def test_a_reversed_order_is_named(found: dict[str, Any]) -> None:
    assert found["reversals"] == [
        {"better_before": "plain", "better_after": "weighted"},
        {"better_before": "none", "better_after": "weighted"},
    ]
    assert found["spearman_before_and_after"] == pytest.approx(-0.5)


def test_the_spreadsheet_has_a_line_for_each_arm_and_time(found: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(spreadsheet(found))))
    assert [(row["arm"], row["when"]) for row in rows] == [
        ("plain", "before RL"), ("plain", "after RL"),
        ("weighted", "before RL"), ("weighted", "after RL"),
        ("none", "before RL"), ("none", "after RL"),
    ]  # fmt: skip
    assert float(rows[3]["seed 8"]) == 0.51


def reported(job: Job, found: dict[str, Any]) -> str:
    """The page of a study with this table."""
    (job.folder / "config.json").write_text(job.model_dump_json())
    (job.folder / "study").mkdir()
    document = found | {"plan": study.plan_of(job)}
    (job.folder / "study" / "study.json").write_text(json.dumps(document))
    with open_run(job) as run:
        run.run_stage("report", report.run)
    return (job.folder / "report" / "index.html").read_text()


def test_the_report_shows_the_study_first(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    write(job, tmp_path)
    page = reported(job, comparison(job, tmp_path))
    headings = re.findall("<h2[^>]*>([^<]*)</h2>", page)
    assert headings[:2] == ["The study", "Arms"]
    assert "weighted ends higher" in page
    assert "plain was ahead of weighted before RL and is behind it after" in page
    assert "weighted - plain +0.050" in page
    assert "This is one seed" not in page
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert markdown.startswith("| arm")


def test_each_cell_has_a_folder_and_a_seed_of_its_own(tmp_path: Path) -> None:
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
    "one arm": ({}, "arms: read 1; expected at least two"),
    "no seeds": ({"seeds": ()}, r"study.seeds: read \[\]; expected at least two"),
    "one seed": ({"seeds": (1,)}, r"study.seeds: read \[1\]; expected at least two"),
    "a seed twice": ({"seeds": (1, 1)}, "expected each one once"),
    "of arms that nobody knows": (
        {"arms": ("other", "plain")},
        r"read \['other'\]; expected names",
    ),
    "of one arm": ({"arms": ("plain",)}, "arms: read 1; expected at least two"),
    "against one that does not take part": (
        {"arms": ("plain", "none"), "baseline": "weighted"},
        r"study.baseline: read 'weighted'; expected an arm: \['plain', 'none'\]",
    ),
    "against nobody": ({"baseline": "other"}, "study.baseline: read 'other'; expected an arm"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_what_is_no_study_is_refused(mistake: Any, tmp_path: Path) -> None:
    settings, message = mistake
    with pytest.raises(ValueError, match=message):
        arms = ("plain",) if not settings else tuple(SCORES)
        job = job_of(tmp_path, arms, settings)
        with open_run(job) as run:
            run.run_stage("study", study.run)
    assert not (tmp_path / "study").exists()
