"""The rows of a run so far: what is to be said of them, and which weights were best."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pear_ray.config import Job
from pear_ray.metrics import read_metrics
from pear_ray.rl.build import ends_of, warnings_of
from pear_ray.rl.publisher import from_first_rank
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.train.ray_train import rank_and_world_size

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner

log = logging.getLogger(__name__)

# Steps in which a warning is not repeated.
STEPS_OF_SILENCE = 20


class RunMonitor:
    """The rows of a run so far: what is to be said of them, and which weights were best."""

    def __init__(self, job: Job, folder: Path, stage: str, first_step: int) -> None:
        self._every, self._home = job.rl.eval_every, folder / stage
        self._num_steps = job.rl.steps
        self._warnings, self._ends = warnings_of(job), ends_of(job)
        self._last_said: dict[type, int] = {}
        self._rank, _ = rank_and_world_size()
        # One rank reads for all: they must come to the same, and it has taken away what was torn.
        rows = from_first_rank(read_metrics(folder, stage) if self._rank == 0 else [])
        self._rows = [row for row in rows if row["step"] < first_step]

    def note(self, step: int, row: dict[str, Any]) -> str | None:
        """Add a step's row. Says what is to be warned of, and returns why the run should end, if
        it should; all ranks come to the same."""
        self._rows.append({"step": step, **row})
        for rule in self._warnings:
            is_fresh = step >= self._last_said.get(type(rule), -STEPS_OF_SILENCE) + STEPS_OF_SILENCE
            if is_fresh and (text := rule(self._rows)):
                self._last_said[type(rule)] = step
                if self._rank == 0:
                    log.warning("%s: %s", self._home.name, text, extra={"step": step})
        return next((text for rule in self._ends if (text := rule(self._rows))), None)

    def keep_best(self, learner: Learner, version: int, rollouts: RolloutBatch, start: str) -> None:
        """Export weights that are going to be evaluated, and of those that were keep the best by
        pass@1, as RUN/STAGE/best."""
        candidates = self._home / "evaluated"
        is_due = self._every and version % self._every == 0 and version < self._num_steps
        if is_due:
            learner.export(candidates / str(version), start)
        if self._rank > 0:
            return
        known = [row["pass_at_1"] for row in self._rows[:-1] if "pass_at_1" in row]
        for evaluated, numbers in sorted(rollouts.evaluations.items()):
            found = candidates / str(evaluated)
            if found.exists() and numbers["pass_at_1"] > max(known, default=-1.0):
                shutil.rmtree(self._home / "best", ignore_errors=True)
                found.rename(self._home / "best")
            known.append(numbers["pass_at_1"])
            for old in candidates.glob("*"):
                if int(old.name) <= evaluated:
                    shutil.rmtree(old)
