"""Learner ranks that cannot start."""

from __future__ import annotations

from pathlib import Path

import pytest

from pear_ray.config import Learner
from pear_ray.train.ray_train import train


def test_ranks_without_room_are_waited_for_only_so_long(ray_session: None, tmp_path: Path) -> None:
    settings = Learner(
        num_workers=2,
        cpus_per_worker=1000,
        tokens_per_micro_batch=64,
        timeout_seconds=3,
        max_failures=0,
    )
    expected = (
        r"waited more than 3 s \(learner.timeout_seconds\) for 2 ranks with"
        r" \{'CPU': 1000.0\} each; the cluster has 4 CPU \(\S+ free\)"
    )
    with pytest.raises(TimeoutError, match=expected):
        train(lambda config: None, {}, settings, {}, tmp_path / "run")
