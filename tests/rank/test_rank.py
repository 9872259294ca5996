"""Stage `rank` on evaluations of checkpoints whose pass rates are known beforehand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from pear_ray import rank
from pear_ray.config import Arm, Job, Model
from pear_ray.errors import ConfigError
from pear_ray.rank.candidates import read
from pear_ray.rank.moves import moves
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
    """Right answers to each problem, of a checkpoint that solves each at a known rate."""
    return np.random.default_rng(seed).binomial(SAMPLES, rates)


def mixed(solvable: float, rate: float) -> np.ndarray:
    """Rates of a checkpoint that solves this share of the problems at this rate, others never."""
    return np.where(np.arange(PROBLEMS) < solvable * PROBLEMS, rate, 0.0)


def write(
    folder: Path,
    counts: dict[str, np.ndarray],
    losses: dict[str, float] | None = None,
    logprob: float = -0.6,
    problems: str = "p",
    **scorecard: Any,
) -> None:
    """What stage `evaluate` leaves of such checkpoints."""
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
    return rank.ranking(job, read(job))


def by_label(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in document["candidates"]}


@pytest.fixture
def narrow_and_wide(tmp_path: Path) -> Path:
    """One that solves few problems often, one that solves many now and then, and a poor one: the
    first has the highest pass@1, the second the highest pass@8."""
    write(
        tmp_path,
        {
            "narrow": counts_of(mixed(0.3, 0.95), 1),
            "wide": counts_of(mixed(0.8, 0.25), 2),
            "poor": counts_of(mixed(0.2, 0.1), 3),
        },
    )
    return tmp_path


def test_pass_at_large_k_decides(narrow_and_wide: Path) -> None:
    document = ranking_of(job_of(narrow_and_wide))
    assert [row["label"] for row in document["candidates"]] == ["wide", "narrow", "poor"]
    assert [row["rank"] for row in document["candidates"]] == [1, 2, 3]
    rows = by_label(document)
    assert rows["narrow"]["pass_at_1"]["value"] > rows["wide"]["pass_at_1"]["value"]
    assert rows["wide"]["probability_of_first"] > 0.99
    assert document["advice"].startswith("Start RL from wide")
    assert "too few to say" in document["advice"]


def test_numbers_are_those_of_the_attempts(narrow_and_wide: Path) -> None:
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
    assert run.facts("rank")["first"] == "wide"


def test_level_candidates_are_not_told_apart(tmp_path: Path) -> None:
    counts = counts_of(mixed(0.5, 0.3), 0)
    write(tmp_path, {"a": counts, "b": counts_of(mixed(0.5, 0.3), 7), "c": counts})
    document = ranking_of(job_of(tmp_path))
    assert "cannot be told apart from" in document["advice"]
    assert max(row["probability_of_first"] for row in document["candidates"]) < 0.9
    rows = by_label(document)
    assert rows["a"]["probability_of_first"] == rows["c"]["probability_of_first"]


@pytest.mark.parametrize("count, what", [(0, "no candidate answered"), (SAMPLES, "solve all")])
def test_all_alike_says_so(tmp_path: Path, count: int, what: str) -> None:
    write(tmp_path, {name: np.full(PROBLEMS, count) for name in "ab"})
    document = ranking_of(job_of(tmp_path))
    assert what in document["advice"] and "Start RL" not in document["advice"]
    assert [row["probability_of_first"] for row in document["candidates"]] == [0.5, 0.5]
    assert all(row["share_without_signal"] == 1.0 for row in document["candidates"])


def test_beaten_in_both_is_dropped_within_one_kind_of_training(tmp_path: Path) -> None:
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
    assert any(
        text.startswith("Held-out loss was not used for other") for text in document["cautions"]
    )
    # The same losses tell nothing where nobody says that the trainings were alike.
    rows = by_label(ranking_of(job_of(tmp_path)))
    assert {row["dropped_for"] for row in rows.values()} == {None}


def test_arms_of_the_run_bring_their_results(tmp_path: Path) -> None:
    """Checkpoints after RL are no candidates; they tell what became of theirs."""
    rates = [0.1, 0.2, 0.3, 0.4, 0.5]
    counts = {}
    for number, rate in enumerate(rates):
        counts[f"arm{number}/sft"] = counts_of(np.full(PROBLEMS, rate), number)
        counts[f"arm{number}/rl"] = counts_of(np.full(PROBLEMS, rate + 0.3), 10 + number)
        home = tmp_path / "arms" / f"arm{number}"
        home.mkdir(parents=True)
        sft = {"objective": "nll", "level": "none", "control": "none"}
        config = {"sft": sft, "corpus": {"scored_path": "scored"}}
        (home / "config.json").write_text(json.dumps(config))
        losses = {"heldout_loss": 1.0 + number / 12, "lowest_heldout_loss": 1.0}
        (home / "metrics.jsonl").write_text(
            json.dumps({"stage": "sft", "step": 9, **losses}) + "\n"
        )
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
    for found in record["predictors"].values():
        assert found["spearman"] == pytest.approx(1.0)
    assert record["predictors"]["pass@1"]["heldout_r_squared"]["mean"] > 0.8
    assert rows["arm4/sft"]["predicted_after_rl"]["value"] == pytest.approx(0.8, abs=0.05)
    assert "Spearman 1.00" in document["advice"]


def test_a_loss_confounded_by_other_data_is_flagged(tmp_path: Path) -> None:
    """Two data sets: within each the lower loss is better; between them it is the other way."""
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


def test_arms_without_sft_tell_what_becomes_of_the_base(tmp_path: Path) -> None:
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


def test_arms_that_cooperate_tell_what_became_of_theirs(tmp_path: Path) -> None:
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


def write_weights(folder: Path, **tensors: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, folder / f"model-{number}.safetensors")


def test_moves_are_told_for_each_arm(narrow_and_wide: Path) -> None:
    """SFT adds ones to a matrix, RL takes half of that back; a head that only one stores is left
    out. An arm that RL has not reached has no second move, one without SFT no first."""
    folder, ones = narrow_and_wide, torch.ones(4, 6)
    write_weights(folder / "base", matrix=2 * ones, norm=torch.ones(6), head=ones)
    for arm in ("whole", "half"):
        write_weights(folder / f"arms/{arm}/sft/export", matrix=3 * ones, norm=torch.ones(6))
    write_weights(folder / "arms/whole/rl/export", matrix=2.5 * ones, norm=torch.ones(6))
    write_weights(folder / "arms/none/rl/export", matrix=2.5 * ones, norm=torch.ones(6))
    for stage in ("sft", "cooperate"):
        twice = 3 * ones if stage == "sft" else 3.5 * ones
        write_weights(folder / f"arms/both/{stage}/export", matrix=twice, norm=torch.ones(6))
    job = job_of(folder).model_copy(
        update={
            "model": Model(path=str(folder / "base"), dtype="float32"),
            "arms": (
                *(Arm(name=name) for name in ("whole", "half", "none", "other")),
                Arm(name="both", cooperate={}),
            ),
        }
    )
    found = moves(job)
    assert found.keys() == {"whole", "half", "none", "both"}
    whole, half, none = found["whole"], found["half"], found["none"]
    assert whole["sft_move"] == pytest.approx((24 / (4 * 24 + 6)) ** 0.5)
    assert whole["rl_move"] == pytest.approx((6 / (9 * 24 + 6)) ** 0.5)
    assert whole["cosine"] == pytest.approx(-1)
    assert whole["matrices"]["matrix"]["sft_move"] == pytest.approx(0.5)
    assert whole["matrices"]["matrix"]["rl_stable_rank"] == pytest.approx(1)
    assert whole["matrices"].keys() == {"matrix"}
    assert half["sft_move"] == whole["sft_move"]
    assert none["sft_move"] == 0 and none["cosine"] is none["sft_stable_rank_median"] is None
    assert none["rl_move"] == pytest.approx((6 / (4 * 24 + 6)) ** 0.5)
    assert found["both"]["rl_move"] == whole["rl_move"]
    assert found["both"]["cosine"] == pytest.approx(1)
    assert half["rl_move"] is half["cosine"] is half["rl_stable_rank_median"] is None


def test_what_may_mislead_is_told(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"a": counts_of(mixed(0.1, 0.5), 0), "b": counts_of(mixed(0.2, 0.5), 1)},
        logprob=-0.1,
    )
    told = "\n".join(ranking_of(job_of(tmp_path))["cautions"])
    assert "stands in for pass@64" in told
    assert "of groups of 8 will be all right or all wrong" in told
    assert "entropy 0.100 nats per token is below 0.18" in told


def test_checkpoints_of_another_run_take_part(narrow_and_wide: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write(other, {"best": counts_of(mixed(0.9, 0.6), 5)})
    document = ranking_of(job_of(narrow_and_wide, runs=[str(other)]))
    assert document["candidates"][0]["label"] == f"{other}:best"
    assert len(document["candidates"]) == 4


MISTAKES = {
    "nothing evaluated": (lambda f: (f / "evaluate/scorecard.json").unlink(), {}, "cannot be read"),
    "scorecard torn": (
        lambda f: (f / "evaluate/scorecard.json").write_text("{"), {}, "is not JSON",
    ),
    "no attempts": (lambda f: (f / "evaluate/attempts.parquet").unlink(), {}, "missing"),
    "k above n": (lambda f: None, {"k": 17}, "rank.k: read 17; expected at most 16"),
    "an unknown name after RL": (lambda f: None, {"after_rl": {"x": 0.5}}, "after_rl: read"),
    "an unknown name trained": (lambda f: None, {"trained_on": {"x": "a"}}, "trained_on: read"),
    "another run without evaluation": (lambda f: None, {"runs": ["nowhere"]}, "nowhere/evaluate"),
    "one checkpoint": (
        lambda f: write(f, {"a": counts_of(mixed(0.5, 0.5), 0)}), {}, "read 1 checkpoints",
    ),
    "no checkpoint": (lambda f: write(f, {}), {}, "read 0 checkpoints"),
    "only results of RL": (
        lambda f: write(f, {"rl": counts_of(mixed(0.5, 0.5), 0)}), {}, "read 0 checkpoints",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told(mistake: Any, narrow_and_wide: Path) -> None:
    spoil, of_rank, message = mistake
    spoil(narrow_and_wide)
    with pytest.raises(ConfigError, match=message):
        ranking_of(job_of(narrow_and_wide, **of_rank))


def test_missing_attempts_are_told(narrow_and_wide: Path) -> None:
    path = narrow_and_wide / "evaluate" / "attempts.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(
        ConfigError, match="'narrow': read 1919 answers; expected 16 to each of 120"
    ):
        ranking_of(job_of(narrow_and_wide))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"temperature": 0.7}, "temperature: read 0.7; expected 1.0"),
        ({"max_new_tokens": 9}, "max_new_tokens: read 9; expected 48"),
        ({"problems": "q"}, "0 of 120 problems are those of"),
    ],
)
def test_evaluations_that_differ_are_not_ranked_together(
    changed: dict[str, Any], message: str, narrow_and_wide: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write(other, {"best": counts_of(mixed(0.9, 0.6), 5)}, **changed)
    with pytest.raises(ConfigError, match=message):
        ranking_of(job_of(narrow_and_wide, runs=[str(other)]))


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_pass_rate_is_a_share(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected pass@1, from 0 to 1"):
        job_of(tmp_path, after_rl={"a": value})
