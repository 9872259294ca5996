"""Learner ranks that cannot start."""

from __future__ import annotations

from pathlib import Path

import pytest

from pear_ray.actors.training import train
from pear_ray.config import Learner


def test_ranks_without_room_are_waited_for_only_so_long(ray_session: None, tmp_path: Path) -> None:
    settings = Learner(
        num_workers=2, cpus_per_worker=1000, tokens_per_micro_batch=64, deadline_seconds=3
    )
    expected = r"waited 3 s \(learner.deadline_seconds\) for 2 ranks with \{'CPU': 1000.*\} each"
    with pytest.raises(TimeoutError, match=expected):
        train(lambda config: None, {}, settings, tmp_path / "run")
