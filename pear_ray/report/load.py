"""The files of a run directory, read into memory. Missing files count as empty."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pear_ray.config import TRAINING_STAGES, Job, start_of
from pear_ray.errors import ConfigError
from pear_ray.metrics import read_metrics

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class ArmData:
    """One directory with a manifest: the run's own, or that of an arm. `prefix` begins the labels of its checkpoints.

    ArmData("pear", prefix="pear/", last_stage="rl", manifest={"stages": {...}},
            rows=[{"stage": "sft", "step": 0, "nll": 2.1, ...}, ...], events=[])
    """

    name: str
    prefix: str
    last_stage: str
    manifest: dict[str, Any]
    rows: Rows
    events: Rows

    def of(self, stage: str) -> Rows:
        """Return the metrics of a stage, step by step."""
        return [row for row in self.rows if row["stage"] == stage]

    @property
    def last(self) -> Rows:
        """Metrics of the last stage, `rl` or `cooperate`."""
        return self.of(self.last_stage)

    @property
    def weighted(self) -> Rows:
        """Metrics of the SFT steps that had importance weights."""
        return [row for row in self.of("sft") if "weight_quantiles" in row]

    @property
    def after_rl(self) -> str:
        """Label of the final checkpoint."""
        return self.prefix + self.last_stage


@dataclass(frozen=True)
class RunData:
    """All directories, the run's own first, the documents of the stages after training, and in `answers` the first
    answer of each checkpoint to each problem."""

    job: Job
    folders: list[ArmData]
    scorecard: dict[str, Any]
    ranking: dict[str, Any]
    moves: dict[str, Any]
    study: dict[str, Any]
    answers: Rows

    @property
    def arms(self) -> list[ArmData]:
        """The directories that were trained or evaluated."""
        return [arm for arm in self.folders if any(arm.of(s) or arm.prefix + s in self.cards for s in TRAINING_STAGES)]

    @property
    def cards(self) -> dict[str, Any]:
        """Scorecards of the evaluated checkpoints by label."""
        return self.scorecard.get("checkpoints", {})

    @property
    def ks(self) -> list[int]:
        """Every k of the evaluated pass@k."""
        return sorted({int(k) for card in self.cards.values() for k in card["pass_at_k"]})

    def before_rl(self, arm: ArmData) -> str:
        """Return the label of the checkpoint that the arm's last stage started from."""
        trained = [f"{arm.prefix}sft"] if arm.of("sft") else []
        return start_of(arm.after_rl, [*self.cards, *trained]) or "base"

    def score(self, label: str, k: int) -> dict[str, float] | None:
        """Return pass@k of a checkpoint with its interval."""
        return self.cards.get(label, {}).get("pass_at_k", {}).get(str(k))

    def difference(self, a: str, b: str, k: int) -> dict[str, Any] | None:
        """Return pass@k of checkpoint `a` minus that of `b`, paired over problems."""
        for row in self.scorecard.get("differences", []):
            if (row["a"], row["b"], row["k"]) == (a, b, k):
                return row
            if (row["a"], row["b"], row["k"]) == (b, a, k):
                return {"value": -row["value"], "low": -row["high"], "high": -row["low"]}
        return None


def column(rows: Iterable[dict[str, Any]], key: str) -> np.ndarray:
    """Return one float64 per row, NaN if missing."""
    return np.array([row.get(key) for row in rows], np.float64)


def mean(values: np.ndarray) -> float:
    """Return the mean of the finite values, NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def means(rows: Rows, keys: Iterable[str]) -> dict[str, float]:
    """Return the mean of each metric over the steps that have it, NaN if none has."""
    return {key: mean(column(rows, key)) for key in keys}


def load_run(job: Job, folder: Path) -> RunData:
    """Read all that a report can show. Raise ConfigError if there is nothing, or a file cannot be parsed."""
    folders = []
    for name, home in job.homes(folder).items():
        path, events = home / "events.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            # A killed process may have cut off a line.
            with suppress(ValueError):
                events.append(json.loads(line))
        folders.append(
            ArmData(
                name=name or folder.name,
                prefix=f"{name}/" if name else "",
                last_stage=job.last_stage_of(name),
                manifest=read_json(home / "manifest.json"),
                rows=read_metrics(home),
                events=events,
            )
        )
    answers, attempts = [], folder / "evaluate" / "attempts.parquet"
    if attempts.exists():
        columns = ["checkpoint", "problem_id", "text", "correct"]
        answers = pq.read_table(attempts, columns=columns, filters=[("sample", "==", 0)]).to_pylist()
    data = RunData(
        job=job,
        folders=folders,
        scorecard=read_json(folder / "evaluate" / "scorecard.json"),
        ranking=read_json(folder / "rank" / "ranking.json"),
        moves=read_json(folder / "rank" / "moves.json"),
        study=read_json(folder / "study" / "study.json"),
        answers=answers,
    )
    if not (data.arms or data.cards or folders[0].of("score")):
        raise ConfigError(
            f"{folder}: expected rows of score, sft, rl or cooperate in metrics.jsonl, there or in the folder of an"
            " arm, or evaluate/scorecard.json, got nothing to report"
        )
    return data


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file, or raise ConfigError if it cannot be parsed."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON, got {error}") from error
