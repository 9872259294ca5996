"""Invented run directories to report on."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray import report
from pear_ray.config import Job
from pear_ray.run import LAYOUT, open_run

ARMS = ("sft", "pear")
HOSTILE = "<script>alert('x')</script> | $x$ \n<img src=http://example.com/x.png>"


def job_of(folder: Path, arms: tuple[str, ...] = ARMS) -> Job:
    levels = {"sft": "none", "pear": "token"}
    return Job.model_validate(
        {
            "run": {"dir": str(folder)},
            "model": {"path": "some/model"},
            "tasks": [{"name": "countdown"}],
            "generator": {"max_new_tokens": 48, "max_model_len": 64},
            "arms": [{"name": arm, "sft": {"level": levels[arm]}} for arm in arms],
        }
    )


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def sft_rows(weighted: bool, num_steps: int = 46) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for step in range(num_steps):
        fall = math.exp(-step / 12)
        row = {
            "stage": "sft",
            "step": step,
            "time": 1e9 + step,
            "loss": 0.5 + 1.5 * fall + rng.normal(0, 0.03),
            "nll": 0.6 + 1.6 * fall + rng.normal(0, 0.03),
            "entropy": 0.9 + 0.2 * fall,
            "num_tokens": 2400,
        }
        if weighted:
            row |= {
                "effective_sample_size": 0.6 + 0.1 * fall,
                "weight_mean": 0.5,
                "log_ratio_mean": -0.02,
                "log_ratio_std": 0.3,
                "clip_frac_low": 0.3,
                "clip_frac_high": 0.05,
                "weight_frac_at_floor": 0.0,
                "weight_frac_at_ceiling": 0.0,
                "weight_quantiles": {"p05": 0.02, "p50": 0.7, "p95": 1.4},
                "weight_by_position": [0.5 + 0.05 * place for place in range(10)],
                "first_weight_by_source": {"teacher_plain": 1.1 + rng.normal(0, 0.05), "teacher_cipher": 0.02},
            }
        rows.append(row)
    return rows


def rl_rows(num_steps: int = 32) -> list[dict]:
    rng = np.random.default_rng(1)
    return [
        {
            "stage": "rl",
            "step": step,
            "time": 2e9 + step,
            "pass_rate": 0.2 + 0.006 * step + rng.normal(0, 0.03),
            "entropy": 0.9 - 0.01 * step,
            "grad_norm": 0.4,
            "loss": -0.001,
            "ratio_mean": 1.0,
            "clip_frac": 0.0,
            "logprob_diff_mean": 2e-7,
            "effective_sample_size": 1.0,
            "logprob_parity_max": None if step == 3 else 2e-6 + 1e-7 * step,
            "completions_mean_length": 14 + 0.1 * step,
            "completions_clipped_ratio": 0.01,
            "frac_reward_zero_std": 0.3,
            "staleness_max": 0,
            "pause_seconds": 0.05,
            "engine_idle_seconds": 1.75,
            "wait_seconds": 3.0,
            "train_seconds": 1.9,
            "publish_seconds": 0.02,
            "step_seconds": 4.92,
            "num_tokens": 3600,
        }
        for step in range(num_steps)
    ]


def scorecard(arms: tuple[str, ...] = ARMS, lead: float = 0.022) -> dict:
    def card(one: float, eight: float) -> dict:
        scores = {"1": one, "8": eight}
        return {
            "path": "some/folder",
            "pass_at_k": {k: {"value": v, "low": v - 0.03, "high": v + 0.03} for k, v in scores.items()},
            "completions_mean_length": 14.2,
            "completions_clipped_ratio": 0.02,
            "mean_logprob": -0.41,
            "pass_at_k_curve": [
                {"value": v, "low": v - 0.03, "high": v + 0.03} for v in np.linspace(one, eight, 8).tolist()
            ],
            "parts": {"style_build": 0.6, "style_undo": 0.4 - one / 10, "style_cipher": 0.0},
            "heldout_nll": None,
        }

    cards = {"base": card(0.148, 0.586)}
    for place, arm in enumerate(arms):
        cards[f"{arm}/sft"] = card(0.244 - 0.004 * place, 0.676)
        cards[f"{arm}/rl"] = card(0.361 + lead * place, 0.607)
    paired = {"value": lead, "low": lead - 0.03, "high": lead + 0.03}
    ks = (1, 8) if len(arms) > 1 else ()
    differences = [{"a": "pear/rl", "b": "sft/rl", "k": k, **paired} for k in ks]
    return {
        "num_problems": 256,
        "samples_per_problem": 16,
        "temperature": 1.0,
        "seed": 0,
        "checkpoints": cards,
        "differences": differences,
    }


def ranking(after_rl: tuple[float | None, ...] = (None, 0.361, 0.383)) -> dict:
    def score(value: float) -> dict:
        return {"value": value, "low": value - 0.03, "high": value + 0.03}

    labels = ("base", "sft/sft", "pear/sft")
    candidates = [
        {
            "rank": None if label == "base" else place,
            "label": label,
            "pass_at_1": score(0.15 + place / 30),
            "pass_at_k": score(0.58 + place / 30),
            "probability_of_first": place / 3,
            "heldout_loss": None if label == "base" else 1.25,
            "regime": "mild over-training" if label == "sft/sft" else None,
            "group_signal": 0.12,
            "share_without_signal": 0.4,
            "entropy": 0.61,
            "after_rl": after,
            **({"predicted_after_rl": {"value": 0.37, "sd": 0.01}} if after else {}),
        }
        for place, (label, after) in enumerate(zip(labels, after_rl, strict=True))
    ]
    scores = {"spearman": 1.0, "r_squared": 0.81, "heldout_r_squared": {"mean": 0.7, "sd": 0.2}}
    return {
        "k": 8,
        "group_size": 8,
        "candidates": candidates,
        "track_record": {"num_known": 4, "predictors": {"pass@8": scores}},
        "advice": f"Start RL from pear/sft {HOSTILE}",
        "cautions": ["base was dropped."],
    }


def write_run(folder: Path) -> Job:
    """Write a run directory as the pipeline leaves it, and return its job."""
    done = {"state": "done", "started": 1e9, "seconds": 62.5, "facts": {}}
    source = {"rows": 1800, "response_tokens": 61234, "truncated": 0, "recorded_gap_max": None}
    gaps = {"bias": -2e-7, "spread": 4e-7, "mean_gap": 3e-7, "max_gap": 7e-6}
    teacher_plain = source | {"from_recorded": 1800, "recorded_gap_max": 3e-6}
    facts = {"rows": 3603, "rejected": 3, "calibration": {"teacher_plain": {"rows": 250, **gaps}}}
    facts |= {"sources": {"teacher_plain": teacher_plain, "teacher_cipher": source | {"from_behavior": 1800}}}
    event = {"time": 1e9, "stage": "rl", "kind": "resumed", "text": HOSTILE}
    for arm in ARMS:
        home = folder / "arms" / arm
        write_lines(home / "metrics.jsonl", sft_rows(arm == "pear") + rl_rows())
        write_lines(home / "events.jsonl", [event])
        stages = {"versions": {}, "stages": {"sft": done, "rl": {"state": "running"}}}
        (home / "manifest.json").write_text(json.dumps(stages))
    (folder / "evaluate").mkdir()
    (folder / "evaluate" / "scorecard.json").write_text(json.dumps(scorecard()))
    answers = [
        {"checkpoint": label, "problem_id": f"p-{problem}", "sample": sample,
         "text": f"{HOSTILE} {label} {problem} {sample}", "correct": problem < 9 or "pear" in label}
        for label in scorecard()["checkpoints"] for problem in range(12) for sample in range(2)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(answers), folder / "evaluate" / "attempts.parquet")
    (folder / "rank").mkdir()
    (folder / "rank" / "ranking.json").write_text(json.dumps(ranking()))
    keys = ("sft_move", "rl_move", "cosine", "sft_stable_rank_median", "rl_stable_rank_median")
    moves = {arm: dict.fromkeys(keys, 0.012) for arm in ARMS}
    (folder / "rank" / "moves.json").write_text(json.dumps(moves))
    stages = dict.fromkeys(("pretrain", "sample", "score", "evaluate"), done)
    stages["score"] = done | {"facts": facts}
    manifest = {"layout": LAYOUT, "versions": {"ray": "2.60.0"}, "stages": stages, "command": "pear-ray report x"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    job = job_of(folder)
    (folder / "config.json").write_text(job.model_dump_json())
    return job


def render(job: Job) -> tuple[str, str, list[dict[str, str]]]:
    """Report on a run; return page, Markdown and rows of the spreadsheet."""
    with open_run(job) as run:
        facts = report.run(job, run)
    folder = Path(facts["page"]).parent
    rows = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))
    assert {path.name for path in folder.iterdir()} == {"index.html", "report.csv", "report.md"}
    return (folder / "index.html").read_text(), (folder / "report.md").read_text(), rows
