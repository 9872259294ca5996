"""Stage `rank` on evaluations of checkpoints with known pass rates."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_ray import rank
from pear_ray.config import Arm, Job
from pear_ray.errors import ConfigError
from pear_ray.records import ATTEMPT_SCHEMA
from pear_ray.run import open_run
from pear_ray.statistics import pass_at_k

PROBLEMS, SAMPLES = 120, 16


def job_of(folder: Path, **of_rank: Any) -> Job:
    return Job.model_validate(
        {
            "run": {"dir": str(folder)},
            "model": {"path": "some/model"},
            "tasks": [{"name": "countdown"}],
            "generator": {"max_new_tokens": 48, "max_model_len": 64},
            "evaluation": {"samples_per_problem": SAMPLES, "ks": [1, 8]},
            "rl": {"group_size": 8},
            "rank": of_rank,
        }
    )


def counts_of(rates: np.ndarray, seed: int) -> np.ndarray:
    """Return the number of correct answers to each problem, given the rate of each."""
    return np.random.default_rng(seed).binomial(SAMPLES, rates)


def mixed(solvable: float, rate: float) -> np.ndarray:
    """Return the rates of a checkpoint that solves some problems at `rate`, others never."""
    return np.where(np.arange(PROBLEMS) < solvable * PROBLEMS, rate, 0.0)


def write(
    folder: Path,
    counts: dict[str, np.ndarray],
    losses: dict[str, float] | None = None,
    logprob: float = -0.6,
    problems: str = "p",
    **scorecard: Any,
) -> None:
    """Write the output of stage `evaluate`."""
    home = folder / "evaluate"
    home.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "checkpoint": label, "problem_id": f"{problems}-{problem:03d}", "task": "countdown",
            "sample": sample, "text": "", "correct": sample < count,
            "reward": float(sample < count), "num_tokens": 5, "finish_reason": "stop",
            "mean_logprob": logprob, "note": "", "parts": {},
        }
        for label, of_problems in counts.items()
        for problem, count in enumerate(of_problems)
        for sample in range(SAMPLES)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, ATTEMPT_SCHEMA), home / "attempts.parquet")
    cards = {
        label: {
            "path": f"models/{label}",
            "entropy": -logprob,
            "completions_clipped_ratio": 0.0,
            "heldout_nll": (losses or {}).get(label),
        }
        for label in counts
    }
    document = {
        "num_problems": PROBLEMS,
        "samples_per_problem": SAMPLES,
        "temperature": 1.0,
        "max_new_tokens": 48,
        "checkpoints": cards,
    }
    (home / "scorecard.json").write_text(json.dumps(document | scorecard))


def ranking_of(job: Job) -> dict[str, Any]:
    return rank.rank_candidates(job)


def by_label(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in document["candidates"]}


@pytest.fixture
def narrow_and_wide(tmp_path: Path) -> Path:
    """One solves few problems often (highest pass@1), one many problems sometimes (highest pass@8), one is poor."""
    write(
        tmp_path,
        {
            "narrow": counts_of(mixed(0.3, 0.95), 1),
            "wide": counts_of(mixed(0.8, 0.25), 2),
            "poor": counts_of(mixed(0.2, 0.1), 3),
        },
    )
    return tmp_path


def test_order_is_by_pass_at_large_k(narrow_and_wide: Path) -> None:
    document = ranking_of(job_of(narrow_and_wide))
    assert [row["label"] for row in document["candidates"]] == ["wide", "narrow", "poor"]
    assert [row["rank"] for row in document["candidates"]] == [1, 2, 3]
    rows = by_label(document)
    assert rows["narrow"]["pass_at_1"]["value"] > rows["wide"]["pass_at_1"]["value"]
    assert rows["wide"]["probability_of_first"] > 0.99
    assert document["advice"].startswith("Start RL from wide")
    assert document["track_record"] == {"num_known": 0, "predictors": {}}


def test_predictors_are_computed_from_the_attempts(narrow_and_wide: Path) -> None:
    rows = by_label(ranking_of(job_of(narrow_and_wide)))
    counts = counts_of(mixed(0.8, 0.25), 2)
    expected = np.mean([pass_at_k(SAMPLES, int(c), 8) for c in counts])
    assert rows["wide"]["pass_at_k"]["value"] == pytest.approx(expected)
    assert rows["wide"]["pass_at_1"]["value"] == pytest.approx(counts.mean() / SAMPLES)
    assert rows["wide"]["entropy"] == pytest.approx(0.6)
    assert rows["wide"]["share_without_signal"] == pytest.approx(
        np.mean(
            [2 - pass_at_k(16, int(c), 8) - pass_at_k(16, 16 - int(c), 8) for c in counts]
        )
    )  # fmt: skip


def test_files_hold_the_ranking(narrow_and_wide: Path) -> None:
    job = job_of(narrow_and_wide)
    with open_run(job) as run:
        run.run_stage("rank", rank.run)
        run.run_stage("rank", rank.run)
    document = json.loads((narrow_and_wide / "rank" / "ranking.json").read_text())
    with (narrow_and_wide / "rank" / "ranking.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [row["label"] for row in document["candidates"]]
    assert float(rows[0]["pass_at_k.value"]) == document["candidates"][0]["pass_at_k"]["value"]
    assert run.manifest["stages"]["rank"]["facts"]["first"] == "wide"


def test_tied_candidates_get_no_clear_advice(tmp_path: Path) -> None:
    counts = counts_of(mixed(0.5, 0.3), 0)
    write(tmp_path, {"a": counts, "b": counts_of(mixed(0.5, 0.3), 7), "c": counts})
    document = ranking_of(job_of(tmp_path))
    assert "not significantly ahead of" in document["advice"]
    assert any(lead["low"] <= 0 for lead in document["leads"].values())
    assert max(row["probability_of_first"] for row in document["candidates"]) < 0.9
    rows = by_label(document)
    assert rows["a"]["probability_of_first"] == rows["c"]["probability_of_first"]


@pytest.mark.parametrize(("count", "advised"), [(0, "easier"), (SAMPLES, "harder")])
def test_problems_that_do_not_separate_candidates(tmp_path: Path, count: int, advised: str) -> None:
    write(tmp_path, {name: np.full(PROBLEMS, count) for name in "ab"})
    document = ranking_of(job_of(tmp_path))
    assert advised in document["advice"] and "Start RL" not in document["advice"]
    assert [row["probability_of_first"] for row in document["candidates"]] == [0.5, 0.5]
    assert all(row["share_without_signal"] == 1.0 for row in document["candidates"])


def test_dominated_candidates_are_dropped_if_trained_alike(tmp_path: Path) -> None:
    counts = {
        "good": counts_of(mixed(0.5, 0.6), 0),
        "bad": counts_of(mixed(0.9, 0.2), 1),
        "other": counts_of(mixed(0.2, 0.1), 2),
    }
    write(tmp_path, counts, {"good": 1.0, "bad": 1.2, "other": 9.0})
    alike = {"good": "corpus, nll", "bad": "corpus, nll"}
    document = ranking_of(job_of(tmp_path, trained_on=alike))
    rows = by_label(document)
    assert rows["bad"]["dropped_for"] == "good" and rows["bad"]["rank"] is None
    assert rows["other"]["dropped_for"] is None, "its loss is of another training"
    assert [row["label"] for row in document["candidates"]] == ["good", "other", "bad"]
    assert any(text.startswith("Held-out loss was not used for other") for text in document["cautions"])
    # Losses are not compared unless the training is known to be alike.
    rows = by_label(ranking_of(job_of(tmp_path)))
    assert {row["dropped_for"] for row in rows.values()} == {None}


@pytest.mark.parametrize(("loss", "dropped_for"), [(1.01, "good"), (1.0, None), (0.99, None)])
def test_a_candidate_is_dropped_only_for_a_lower_loss(loss: float, dropped_for: str | None, tmp_path: Path) -> None:
    counts = {"good": counts_of(mixed(0.5, 0.6), 0), "bad": counts_of(mixed(0.9, 0.2), 1)}
    write(tmp_path, counts, {"good": 1.0, "bad": loss})
    document = ranking_of(job_of(tmp_path, trained_on=dict.fromkeys(counts, "corpus, nll")))
    assert by_label(document)["bad"]["dropped_for"] == dropped_for


def test_results_of_the_arms_are_the_track_record(tmp_path: Path) -> None:
    """Checkpoints after RL are not candidates but the results of theirs."""
    rates = [0.1, 0.2, 0.3, 0.4, 0.5]
    counts = {}
    for number, rate in enumerate(rates):
        counts[f"arm{number}/sft"] = counts_of(np.full(PROBLEMS, rate), number)
        counts[f"arm{number}/rl"] = counts_of(np.full(PROBLEMS, rate + 0.3), 10 + number)
        home = tmp_path / "arms" / f"arm{number}"
        home.mkdir(parents=True)
        sft = {"objective": {"type": "nll"}, "level": "none", "control": "none"}
        config = {"sft": sft, "corpus": {"scored_path": "scored"}}
        (home / "config.json").write_text(json.dumps(config))
        losses = {"heldout_loss": 1.0 + number / 12, "lowest_heldout_loss": 1.0}
        (home / "metrics.jsonl").write_text(json.dumps({"stage": "sft", "step": 9, **losses}) + "\n")
    write(tmp_path, counts, {f"arm{number}/sft": 2.0 - number / 10 for number in range(5)})
    arms = tuple(Arm(name=f"arm{number}") for number in range(5))
    document = ranking_of(job_of(tmp_path, k=1).model_copy(update={"arms": arms}))
    rows = by_label(document)
    assert set(rows) == {f"arm{number}/sft" for number in range(5)}
    assert rows["arm3/sft"]["after_rl"] == pytest.approx(counts["arm3/rl"].mean() / SAMPLES)
    assert rows["arm0/sft"]["regime"] == "stable"
    assert rows["arm1/sft"]["regime"] == "mild over-training"
    assert rows["arm4/sft"]["regime"] == "severe over-training"
    record = document["track_record"]
    assert record["num_known"] == 5 and not record["loss_is_confounded"]
    for scores in record["predictors"].values():
        assert scores["spearman"] == pytest.approx(1.0)
    assert record["predictors"]["pass@1"]["heldout_r_squared"]["mean"] > 0.8
    assert rows["arm4/sft"]["predicted_after_rl"]["value"] == pytest.approx(0.8, abs=0.05)
    assert "Spearman 1.00" in document["advice"]


def test_a_confounded_loss_is_flagged(tmp_path: Path) -> None:
    """Two data sets: a lower loss is better within each and worse between them."""
    counts, losses, after = {}, {}, {}
    for data, (rate, loss) in enumerate([(0.2, 1.0), (0.5, 3.0)]):
        for number in range(3):
            name = f"{'ab'[data]}{number}"
            counts[name] = counts_of(np.full(PROBLEMS, rate + 0.04 * number), 7 * data + number)
            losses[name], after[name] = loss - 0.1 * number, rate + 0.04 * number
    write(tmp_path, counts, losses)
    trained_on = {name: name[0] for name in counts}
    document = ranking_of(job_of(tmp_path, after_rl=after, trained_on=trained_on))
    record = document["track_record"]
    assert record["loss_is_confounded"]
    assert record["predictors"]["held-out loss"]["spearman"] < 0
    assert record["predictors"]["pass@8"]["spearman"] > 0.9
    assert any("confounded" in text for text in document["cautions"])
    within = {name: value for name, value in after.items() if name[0] == "a"}
    few = ranking_of(job_of(tmp_path, after_rl=within, trained_on=trained_on))
    assert few["track_record"]["predictors"] == {}


def test_arms_without_sft_are_results_of_the_base(tmp_path: Path) -> None:
    counts = {
        "base": counts_of(mixed(0.5, 0.4), 0),
        "a@0/sft": counts_of(mixed(0.6, 0.4), 1),
        "a@0/rl": counts_of(mixed(0.6, 0.8), 2),
        "none@0/rl": counts_of(mixed(0.6, 0.7), 3),
        "none@1/rl": counts_of(mixed(0.6, 0.6), 4),
    }
    write(tmp_path, counts)
    rows = by_label(ranking_of(job_of(tmp_path)))
    assert rows.keys() == {"base", "a@0/sft"}
    of_base = np.mean([counts[f"none@{seed}/rl"].mean() for seed in (0, 1)]) / SAMPLES
    assert rows["base"]["after_rl"] == pytest.approx(of_base)
    assert rows["a@0/sft"]["after_rl"] == pytest.approx(counts["a@0/rl"].mean() / SAMPLES)


def test_checkpoints_after_cooperate_are_results_of_theirs(tmp_path: Path) -> None:
    counts = {
        "base": counts_of(mixed(0.5, 0.4), 0),
        "a/sft": counts_of(mixed(0.6, 0.4), 1),
        "a/cooperate": counts_of(mixed(0.6, 0.8), 2),
        "none/cooperate": counts_of(mixed(0.6, 0.7), 3),
    }
    write(tmp_path, counts)
    rows = by_label(ranking_of(job_of(tmp_path)))
    assert rows.keys() == {"base", "a/sft"}
    for start, end in (("a/sft", "a/cooperate"), ("base", "none/cooperate")):
        assert rows[start]["after_rl"] == pytest.approx(counts[end].mean() / SAMPLES)


def test_cautions(tmp_path: Path) -> None:
    write(tmp_path, {"a": counts_of(mixed(0.1, 0.5), 0), "b": counts_of(mixed(0.2, 0.5), 1)}, logprob=-0.1)
    texts = "\n".join(ranking_of(job_of(tmp_path))["cautions"])
    assert "stands in for pass@64" in texts
    assert "of groups of 8" in texts
    assert "entropy 0.100 nats per token is below 0.18" in texts


def test_checkpoints_of_another_run_are_candidates(narrow_and_wide: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write(other, {"best": counts_of(mixed(0.9, 0.6), 5)})
    document = ranking_of(job_of(narrow_and_wide, runs=[str(other)]))
    assert document["candidates"][0]["label"] == f"{other}:best"
    assert len(document["candidates"]) == 4


def delete(name):
    return lambda folder: (folder / "evaluate" / name).unlink()


def evaluate_only(*labels):
    return lambda folder: write(folder, dict.fromkeys(labels, counts_of(mixed(0.5, 0.5), 0)))


def no_change(folder):
    return None


MISTAKES = {
    "no scorecard": (delete("scorecard.json"), {}, "scorecard.json: expected"),
    "scorecard torn": (
        lambda folder: (folder / "evaluate/scorecard.json").write_text("{"),
        {},
        "scorecard.json: expected",
    ),
    "no attempts": (delete("attempts.parquet"), {}, "attempts.parquet: expected"),
    "attempts of another program": (
        lambda folder: pq.write_table(pa.table({"problem": ["a"]}), folder / "evaluate/attempts.parquet"),
        {},
        "attempts.parquet: expected",
    ),
    "older layout": (
        lambda folder: (folder / "manifest.json").write_text('{"stages": {"rl": {}}}'),
        {},
        "manifest.json: expected layout .* run again: rl$",
    ),
    "k above n": (no_change, {"k": 17}, "^rank.k: expected at most 16 samples .*, got 17$"),
    "unknown name after RL": (no_change, {"after_rl": {"x": 0.5}}, "after_rl: expected names"),
    "unknown name trained": (no_change, {"trained_on": {"x": "a"}}, "trained_on: expected names"),
    "other run without evaluation": (no_change, {"runs": ["nowhere"]}, "nowhere/evaluate"),
    "one checkpoint": (evaluate_only("a"), {}, r"at least two checkpoints .*, got \['a'\]$"),
    "no checkpoint": (evaluate_only(), {}, r"got \[\]$"),
    "only results of RL": (evaluate_only("rl"), {}, r"got \[\]$"),
}


@pytest.mark.parametrize(("spoil", "of_rank", "message"), MISTAKES.values(), ids=MISTAKES)
def test_bad_input_is_refused(spoil: Any, of_rank: dict[str, Any], message: str, narrow_and_wide: Path) -> None:
    spoil(narrow_and_wide)
    with pytest.raises(ConfigError, match=message):
        ranking_of(job_of(narrow_and_wide, **of_rank))


def test_missing_attempts_are_refused(narrow_and_wide: Path) -> None:
    path = narrow_and_wide / "evaluate" / "attempts.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(ConfigError, match=r"'narrow': expected 16 .* 120 problems, got 1919"):
        ranking_of(job_of(narrow_and_wide))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0.7}, "temperature: expected 1.0, .*, got 0.7"),
        ({"max_new_tokens": 9}, "max_new_tokens: expected 48, .*, got 9"),
        ({"problems": "q"}, "got 120 of which 0 are the same"),
    ],
)
def test_evaluations_that_differ_are_refused(
    changed: dict[str, Any], message: str, narrow_and_wide: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write(other, {"best": counts_of(mixed(0.9, 0.6), 5)}, **changed)
    with pytest.raises(ConfigError, match=message):
        ranking_of(job_of(narrow_and_wide, runs=[str(other)]))


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_pass_rate_is_a_fraction(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"after_rl\.a"):
        job_of(tmp_path, after_rl={"a": value})
