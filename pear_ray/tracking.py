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


class Tracker:
    """Numbers of one stage of one run, by step."""

    def __init__(self, folder: Path, stage: str, settings: Tracking) -> None:
        self._path = folder / "metrics.jsonl"
        self._stage = stage
        self._run = folder.name
        self._gauges: dict[str, prometheus.Gauge] = {}
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
        """Write one step. Values are numbers, strings, or lists and dicts of numbers."""
        row = {"stage": self._stage, "step": step, "time": round(time.time(), 3), **numbers}
        with self._path.open("a") as file:
            file.write(json.dumps(finite(row)) + "\n")
        scalars = {k: float(v) for k, v in numbers.items() if isinstance(v, int | float)}
        for name, value in scalars.items():
            if name not in self._gauges:
                self._gauges[name] = prometheus.Gauge(
                    f"pear_ray_{self._stage}_{name}",
                    description=f"{name.replace('_', ' ')}, latest step of stage {self._stage}",
                    tag_keys=("run",),
                )
            self._gauges[name].set(value, tags={"run": self._run})
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


def finite(value: Any) -> Any:
    """The same JSON document with null in place of what JSON cannot say."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
