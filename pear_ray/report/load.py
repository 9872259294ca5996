"""What a run folder holds, read into memory. Files that are not there count as empty."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.config import TRAINING_STAGES, Cooperate, last_stage_with, start_of
from pear_ray.errors import ConfigError
from pear_ray.run import flatten

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class ArmData:
    """One run folder: the run's own, or that of an arm.

    `prefix` begins the labels of its checkpoints, `last_stage` is the one that it ends with,
    `settings` says what the arm sets differently, `rows` are the lines of metrics.jsonl by stage.

        Home("pear", "pear/", "rl", "sft.level = token", manifest={...}, rows={"sft": [...]},
             events=[])
    """

    name: str
    prefix: str
    last_stage: str
    settings: str
    manifest: dict[str, Any]
    rows: dict[str, Rows]
    events: Rows

    def of(self, stage: str) -> Rows:
        """The lines of a stage, in order."""
        return self.rows.get(stage, [])

    def values(self, stage: str, key: str) -> np.ndarray:
        """One number per step, NaN where there is none."""
        return as_floats(row.get(key) for row in self.of(stage))

    @property
    def last(self) -> Rows:
        """The lines of the stage that it ends with."""
        return self.of(self.last_stage)

    @property
    def after_rl(self) -> str:
        """Label of the checkpoint that it ends with."""
        return f"{self.prefix}{self.last_stage}"

    @property
    def weighted(self) -> Rows:
        """The SFT steps that had importance weights."""
        return [row for row in self.of("sft") if "weight_quantiles" in row]


@dataclass(frozen=True)
class RunData:
    """Everything that was read: the run's own folder, its arms, the job, evaluation, ranking,
    moves of parameters, study, and every checkpoint's first answer to each problem."""

    own: ArmData
    arms: tuple[ArmData, ...]
    job: dict[str, Any]
    scorecard: dict[str, Any]
    ranking: dict[str, Any]
    moves: dict[str, Any]
    study: dict[str, Any]
    answers: Rows

    @property
    def homes(self) -> list[ArmData]:
        """Every folder, the run's own first."""
        return [self.own, *(arm for arm in self.arms if arm is not self.own)]

    @property
    def cards(self) -> dict[str, Any]:
        """Evaluated checkpoints by label."""
        return self.scorecard.get("checkpoints", {})

    @property
    def ks(self) -> list[int]:
        """Every k of the pass@k that were computed."""
        return sorted({int(k) for card in self.cards.values() for k in card["pass_at_k"]})

    def before_rl(self, home: ArmData) -> str:
        """Label of the checkpoint that the last stage began with."""
        trained = [f"{home.prefix}sft"] if home.of("sft") else []
        return start_of(home.after_rl, [*self.cards, *trained]) or "base"

    def score(self, label: str, k: int) -> dict[str, float] | None:
        """pass@k of a checkpoint with its interval."""
        return self.cards.get(label, {}).get("pass_at_k", {}).get(str(k))

    def difference(self, a: str, b: str, k: int) -> dict[str, float] | None:
        """pass@k of checkpoint a minus that of b, paired over problems, with its interval."""
        for found in self.scorecard.get("differences", []):
            value, low, high = found["value"], found["low"], found["high"]
            if (found["a"], found["b"], found["k"]) == (a, b, k):
                return {"value": value, "low": low, "high": high}
            if (found["a"], found["b"], found["k"]) == (b, a, k):
                return {"value": -value, "low": -high, "high": -low}
        return None


def as_floats(values: Iterable[Any]) -> np.ndarray:
    """Numbers as float64, NaN for what is none."""
    return np.array([np.nan if value is None else float(value) for value in values], np.float64)


def read(folder: Path) -> RunData:
    """Everything in the run folder that a report can show.

    Raises:
        ConfigError: there is nothing to show, or a file is not what its stage writes.
    """
    job = read_json(folder / "config.json")
    alone = {"cooperate": job.get("cooperate") and {}}
    homes = [read_home(folder, folder.name, "", job, in_words(alone, job))]
    for arm in job.get("arms", []):
        told = in_words(arm, job)
        name = arm["name"]
        homes.append(read_home(folder / "arms" / name, name, f"{name}/", arm, told))
        for seed in job.get("study", {}).get("seeds", []):
            cell, own = f"{name}@{seed}", folder / "seeds" / str(seed) / name
            homes.append(read_home(own, cell, f"{cell}/", arm, told))
    scorecard = read_json(folder / "evaluate" / "scorecard.json")
    labels = scorecard.get("checkpoints", {})
    arms = tuple(
        home
        for home in homes
        if any(home.of(stage) or home.prefix + stage in labels for stage in TRAINING_STAGES)
    )
    own = homes[0]
    if not arms and not labels and not own.of("score"):
        raise ConfigError(
            f"{folder}: holds nothing to report; expected rows of score, sft, rl or cooperate in"
            " metrics.jsonl, there or in the folder of an arm, or evaluate/scorecard.json"
        )
    ranking, moves = (read_json(folder / "rank" / f"{name}.json") for name in ("ranking", "moves"))
    study = read_json(folder / "study" / "study.json")
    answers = read_first_answers(folder / "evaluate" / "attempts.parquet")
    return RunData(own, arms, job, scorecard, ranking, moves, study, answers)


def in_words(arm: dict[str, Any], job: dict[str, Any]) -> str:
    """What an arm sets differently, and how it cooperates, if it does."""
    settings = {stage: arm[stage] for stage in TRAINING_STAGES if arm.get(stage)}
    if arm.get("cooperate") is not None:
        shared = job.get("cooperate") or {"method": Cooperate().method}
        settings["cooperate"] = {"method": shared["method"], **arm["cooperate"]}
    words = ["no SFT"] if arm.get("sft") is False else []
    words += [f"{key} = {value}" for key, value in flatten(settings) if key]
    return ", ".join(words)


def read_home(folder: Path, name: str, prefix: str, said: dict[str, Any], settings: str) -> ArmData:
    """One run folder, of the arm or the job that this is said of."""
    rows: dict[str, Rows] = {}
    for row in read_lines(folder / "metrics.jsonl"):
        rows.setdefault(row["stage"], []).append(row)
    manifest, events = read_json(folder / "manifest.json"), read_lines(folder / "events.jsonl")
    last_stage = last_stage_with(said.get("cooperate"))
    return ArmData(name, prefix, last_stage, settings, manifest, rows, events)


def read_first_answers(path: Path) -> Rows:
    """One answer of each checkpoint to each problem.

    Raises:
        ConfigError: the file is not what stage `evaluate` writes.
    """
    if not path.exists():
        return []
    columns = ["checkpoint", "problem_id", "text", "correct"]
    try:
        table = pq.read_table(path, columns=columns, filters=[("sample", "==", 0)])
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise ConfigError(f"{path}: {error}; expected what stage `evaluate` writes") from error
    return table.to_pylist()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file.

    Raises:
        ConfigError: it is none.
    """
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; expected the JSON that a stage writes") from error


def read_lines(path: Path) -> Rows:
    """The objects of a JSONL file. Half a line, left by a killed process, is passed over."""
    rows: Rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
