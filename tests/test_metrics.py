"""metrics.jsonl: one line per step; steps that an attempt lost are dropped."""

from __future__ import annotations

import json
import math

import pytest

from pear_ray.config import Tracking
from pear_ray.metrics import Tracker, finite, prometheus_name, read_metrics


@pytest.fixture
def track(tmp_path):
    """Create a tracker of a stage in one run folder."""
    return lambda stage: Tracker(tmp_path, stage, Tracking())


def rows(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_one_line_per_step(track, tmp_path):
    tracker = track("sft")
    tracker.log(0, loss=1.5, quantiles={"p50": 0.5}, by_position=[1.0, 2.0], arm="pear")
    tracker.log(1, loss=1)
    tracker.close()
    first, second = rows(tmp_path)
    assert first["time"] <= second["time"]
    del first["time"]
    assert first == {
        "stage": "sft",
        "step": 0,
        "loss": 1.5,
        "quantiles": {"p50": 0.5},
        "by_position": [1.0, 2.0],
        "arm": "pear",
    }
    assert (second["step"], second["loss"]) == (1, 1)


def test_numbers_that_are_not_finite_are_written_as_null(track, tmp_path):
    track("rl").log(0, loss=math.nan, parts={"high": math.inf, "low": [-math.inf, 2.0], "ok": (1, math.nan)})
    (row,) = rows(tmp_path)
    assert row["loss"] is None
    assert row["parts"] == {"high": None, "low": [None, 2.0], "ok": [1, None]}


def test_finite_keeps_everything_else():
    document = {"a": [1, 2.5, "nan", None, True], "b": {"c": ()}}
    assert finite(document) == {"a": [1, 2.5, "nan", None, True], "b": {"c": []}}


def test_rewind_drops_later_steps_of_its_own_stage_only(track, tmp_path):
    sft, rl = track("sft"), track("rl")
    for step in range(5):
        sft.log(step, loss=float(step))
        rl.log(step, reward_mean=float(step))
    again = track("sft").rewind(2)
    again.log(2, loss=20.0)
    assert [row["step"] for row in read_metrics(tmp_path, "rl")] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in read_metrics(tmp_path, "sft")] == [0, 1, 2]
    assert rows(tmp_path)[-1]["loss"] == 20.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewind_to_the_beginning_and_without_a_file(track, tmp_path):
    tracker = track("sft").rewind(0)
    assert not (tmp_path / "metrics.jsonl").exists()
    tracker.log(0, loss=1.0)
    track("sft").rewind(0)
    assert rows(tmp_path) == []


def test_cooperate_shares_the_prometheus_names_of_rl():
    for stage in ("rl", "cooperate"):
        assert prometheus_name(stage, "pass_rate") == "pear_ray_rl_pass_rate"
    own = prometheus_name("cooperate", "cooperative_gain")
    assert own == "pear_ray_cooperate_cooperative_gain"


def test_a_torn_last_line_is_skipped(track, tmp_path):
    assert read_metrics(tmp_path) == []
    track("sft").log(0, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "st')
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0]
    track("sft").rewind(1).log(1, loss=2.0)
    assert [row["loss"] for row in rows(tmp_path)] == [1.0, 2.0]
