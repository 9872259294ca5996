"""Monitoring of a run on its ranks: metric rows, alerts, early stopping, the best weights.

Alerts and stopping rules read the rows of the run so far, oldest first, and have no state of their own: a resumed run
passes the rows that it kept.
"""

from __future__ import annotations

import logging
import math
import resource
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pear_ray.metrics import Tracker, read_metrics
from pear_ray.records import TrainingBatch
from pear_ray.rl.train_step import RankConfig, broadcast_from_first_rank
from pear_ray.train.ray_train import rank_and_world_size

if TYPE_CHECKING:
    from pear_ray.train.learner import Learner

log = logging.getLogger(__name__)

# Steps before an alert is logged again.
STEPS_BETWEEN_ALERTS = 20

Rows = Sequence[Mapping[str, Any]]
Alert = Callable[[Rows], str | None]


def low_entropy(rows: Rows, floor_nats: float = 0.18) -> str | None:
    """Alert if the mean next-token entropy at temperature 1 is below `floor_nats` (arXiv 2606.18487 measured .18 on one
    model: a policy this certain hardly explores)."""
    step, entropy = rows[-1]["step"], rows[-1].get("entropy", math.inf)
    if not entropy < floor_nats:
        return None
    return f"step {step}: entropy is {entropy:.3f} nats per token, below {floor_nats}: the policy hardly explores"


def falling_entropy(rows: Rows, first_step: int = 10, last_step: int = 150, max_fall: float = 0.5) -> str | None:
    """Alert if, up to `last_step`, entropy is more than `max_fall` (a share) below that of the first row from
    `first_step` on (arXiv 2606.18487: better stop such a run)."""
    watched = [r for r in rows if first_step <= r["step"] <= last_step and "entropy" in r]
    if not watched or watched[-1] is not rows[-1]:
        return None
    first, newest = watched[0], watched[-1]
    if not newest["entropy"] < (1 - max_fall) * first["entropy"]:
        return None
    return (
        f"step {newest['step']}: entropy fell to {newest['entropy']:.3f} nats per token from {first['entropy']:.3f} at"
        f" step {first['step']}, by more than {max_fall:.0%}"
    )


def little_signal(rows: Rows, group_size: int, max_frac: float = 0.5) -> str | None:
    """Alert if more than `max_frac` of a step's groups have equal rewards, and thus no gradient."""
    newest, frac = rows[-1], rows[-1].get("frac_reward_zero_std", 0)
    if not frac > max_frac:
        return None
    threshold = threshold_pass_rate(group_size)
    return (
        f"step {newest['step']}: {frac:.0%} of the groups have equal rewards, more than {max_frac:.0%}; the pass rate"
        f" is {newest['pass_rate']:.3f}, and below {threshold:.3f} or above {1 - threshold:.3f} most groups of"
        f" {group_size} have: use other problems or larger groups"
    )


def threshold_pass_rate(group_size: int) -> float:
    """Return p*(g), the lower root of (1 - p)^g + p^g = 1/2: below it most groups of g completions are all right or all
    wrong (arXiv 2606.18487). .5 for g = 2, .083 for g = 8."""
    from scipy.optimize import brentq

    return brentq(lambda p: (1 - p) ** group_size + p**group_size - 0.5, 0.0, 0.5, xtol=1e-15)


def stop_reason(rows: Rows, patience: int, target: float | None) -> str | None:
    """Return why a run should stop: an evaluated pass@1 is at least `target`, or none of the last `patience`
    evaluations (0: off) is better than the best before them."""
    step, best, num_since = -1, -math.inf, 0
    for row in (row for row in rows if "pass_at_1" in row):
        step, pass_rate = row["step"], row["pass_at_1"]
        if target is not None and pass_rate >= target:
            return f"step {step}: pass_at_1 reached {target}: it is {pass_rate}"
        # NaN is no improvement.
        best, num_since = (pass_rate, 0) if pass_rate > best else (best, num_since + 1)
    if not patience or num_since < patience:
        return None
    return f"step {step}: pass_at_1 has not improved in {num_since} evaluations: its best is {best}"


class RunMonitor:
    """Writes the rows of a run, logs alerts, decides when to stop and keeps the best weights."""

    def __init__(self, config: RankConfig, first_step: int) -> None:
        self._config = config
        self._rl = config.job.rl
        self._first_step = first_step
        few_signals = partial(little_signal, group_size=self._rl.group_size)
        self._alerts: list[Alert] = [low_entropy, falling_entropy, few_signals]
        self._last_alert: dict[Alert, int] = {}
        self._is_first_rank = rank_and_world_size()[0] == 0
        self._tracker: Tracker | None = None
        rows: list[dict[str, Any]] = []
        if self._is_first_rank:
            self._tracker = Tracker(config.run_dir, config.stage, config.job.tracking).rewind(first_step)
            rows = read_metrics(config.run_dir, config.stage)
        # One rank reads for all, so that all come to the same decisions.
        self._rows: list[dict[str, Any]] = broadcast_from_first_rank(rows)

    def record(self, step: int, row: dict[str, Any], micro_batches: Sequence[TrainingBatch]) -> str | None:
        """Write a step's row and log alerts; return why the run should stop, if it should. Every rank returns the
        same."""
        if self._tracker:
            self._tracker.log(step, **row)
        if step == self._first_step:
            self._log_shapes(step, micro_batches)
        self._rows.append({"step": step, **row})
        for alert in self._alerts:
            last_step = self._last_alert.get(alert, -STEPS_BETWEEN_ALERTS)
            if step >= last_step + STEPS_BETWEEN_ALERTS and (message := alert(self._rows)):
                self._last_alert[alert] = step
                self._log(logging.WARNING, step, message)
        reason = stop_reason(self._rows, self._rl.early_stopping_patience, self._rl.target_pass_rate)
        if reason:
            self._log(logging.INFO, step, f"stops early: {reason}")
        return reason

    def keep_best(self, learner: Learner, version: int, evaluations: Mapping[int, Mapping[str, float]]) -> None:
        """Export a version that will be evaluated, and keep the best of the evaluated ones by pass@1 as RUN/STAGE/best;
        collective."""
        candidates, best = self._config.folder / "evaluated", self._config.folder / "best"
        every = self._rl.eval_every
        if every and version % every == 0 and version < self._rl.steps:
            learner.export(candidates / str(version), self._config.start_model)
        if not self._is_first_rank:
            return
        previous = [row["pass_at_1"] for row in self._rows[:-1] if "pass_at_1" in row]
        for evaluated, metrics in sorted(evaluations.items()):
            candidate = candidates / str(evaluated)
            if candidate.exists() and metrics["pass_at_1"] > max(previous, default=-1.0):
                shutil.rmtree(best, ignore_errors=True)
                candidate.rename(best)
            previous.append(metrics["pass_at_1"])
            for old in candidates.glob("*"):
                if int(old.name) <= evaluated:
                    shutil.rmtree(old)

    def close(self) -> None:
        """Flush the trackers."""
        if self._tracker:
            self._tracker.close()

    def _log_shapes(self, step: int, micro_batches: Sequence[TrainingBatch]) -> None:
        sizes = [len(batch.token_ids_T) for batch in micro_batches]
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            peak_bytes = torch.cuda.max_memory_allocated()
        text = f"a rank's step: {len(sizes)} micro-batches of {min(sizes)} to {max(sizes)} tokens (at most"
        text += f" {self._config.job.learner.tokens_per_pack}), peak memory {peak_bytes / 2**30:.2f} GiB"
        self._log(logging.INFO, step, text)

    def _log(self, level: int, step: int, message: str) -> None:
        if self._is_first_rank:
            log.log(level, "%s: %s", self._config.stage, message, extra={"step": step})
