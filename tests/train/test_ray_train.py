"""Learner ranks that cannot start, and the best of their checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pear_ray.config import Learner
from pear_ray.train.ray_train import best_report, run_ray_train


def test_ranks_without_room_time_out_and_name_what_is_missing(ray_session: None, tmp_path: Path) -> None:
    config = Learner(num_workers=2, cpus_per_worker=1000, tokens_per_micro_batch=64, timeout_seconds=3, max_failures=0)
    expected = (
        r"learner\.timeout_seconds: expected 2 ranks with \{'CPU': 1000\.0\} each to start within"
        r" 3 s; the cluster has 4 CPU \(\S+ free\)"
    )
    with pytest.raises(TimeoutError, match=expected):
        run_ray_train(lambda inputs: {}, None, config, {}, tmp_path / "run")


def test_the_best_report_has_the_lowest_measured_loss() -> None:
    losses = [None, 0.7, 0.3, 0.5, 0.3]
    metrics = [{"next_step": n} | ({} if loss is None else {"heldout_loss": loss}) for n, loss in enumerate(losses)]
    best = best_report([SimpleNamespace(metrics=one) for one in metrics])
    assert best is not None and best.metrics == {"next_step": 2, "heldout_loss": 0.3}
    assert best_report([SimpleNamespace(metrics={"next_step": 0})]) is None
