"""Where numbers go: metrics.jsonl always, Ray's Prometheus endpoint, TensorBoard or W&B if asked.

Only stages write here. A number that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Self

from ray.util import metrics as prometheus

from pear_ray.config import Tracking
from pear_ray.measures import MEASURES, metric

TAGS = ("run", "stage")
EVENTS = "Lines of events.jsonl: deaths, restarts, resumes, engines that come and go"


class Tracker:
    """Numbers of one stage of one run, by step."""

    def __init__(self, folder: Path, stage: str, settings: Tracking) -> None:
        self._path = folder / "metrics.jsonl"
        self._stage = stage
        self._tags = {"run": str(folder), "stage": stage}
        self._step = prometheus.Gauge("pear_ray_step", "Latest step of the stage", TAGS)
        self._step_time = prometheus.Gauge(
            "pear_ray_step_time_seconds", "When the latest step of the stage ended, Unix time", TAGS
        )
        self._gauges = {
            name: prometheus.Gauge(metric(stage, name), text, TAGS)
            for name, text in MEASURES[stage].items()
        }
        self._tensorboard: Any = None
        self._wandb: Any = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard" / stage))
        if settings.wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=settings.wandb_project, name=f"{folder.name}-{stage}", dir=str(folder)
            )

    def rewind(self, step: int) -> Self:
        """Forget this stage's numbers from `step` on: an attempt that did not last wrote them."""
        if self._path.exists():
            # A kill may have torn the last line: whole lines end with a newline.
            whole, _, _ = self._path.read_text().rpartition("\n")
            kept = [
                line
                for line in whole.splitlines()
                if (row := json.loads(line))["stage"] != self._stage or row["step"] < step
            ]
            aside = self._path.with_name("metrics.jsonl.partial")
            aside.write_text("".join(line + "\n" for line in kept))
            aside.replace(self._path)
        return self

    def log(self, step: int, **numbers: Any) -> None:
        """Write one step. Values are numbers, strings, or lists and dicts of numbers.

        Raises:
            KeyError: `MEASURES` does not say what a number means.
        """
        now = round(time.time(), 3)
        row = {"stage": self._stage, "step": step, "time": now, **numbers}
        with self._path.open("a") as file:
            file.write(json.dumps(finite(row)) + "\n")
        scalars = {k: float(v) for k, v in numbers.items() if isinstance(v, int | float)}
        self._step.set(step, self._tags)
        self._step_time.set(now, self._tags)
        for name, value in scalars.items():
            self._gauges[name].set(value, self._tags)
            if self._tensorboard is not None:
                self._tensorboard.add_scalar(f"{self._stage}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{self._stage}/{k}": v for k, v in scalars.items()}, step=step)

    def close(self) -> None:
        """Hand over what is still buffered."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def count_event(run: str, stage: str, kind: str) -> None:
    """Count what happened out of the ordinary, and say when it last did: alerts ask for the second,
    since a counter that appears has not risen."""
    tags = {"run": run, "stage": stage, "kind": kind}
    prometheus.Counter("pear_ray_events", EVENTS, tuple(tags)).inc(tags=tags)
    latest = prometheus.Gauge(
        "pear_ray_event_time_seconds", "When such an event last happened, Unix time", tuple(tags)
    )
    latest.set(time.time(), tags)


def finite(value: Any) -> Any:
    """The same JSON document with null in place of what JSON cannot say."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
