"""Learners that wait for rollouts get another engine, and Ray's autoscaler a node for it; both go when nobody needs
them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.growing import Growing, growing_cluster
from tests.cluster.nodes import PLACEMENT
from tests.tiny_job import tiny_job

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]

STEPS = 30
SECONDS_IDLE = 6.0


@dataclass
class Story:
    run: Path
    cluster: Growing
    job: dict[str, Any]


def write_job(folder: Path, model: Path) -> Path:
    """Engines are the bottleneck: each works on few answers at a time and fills a node."""
    return tiny_job(
        folder,
        model,
        "countdown",
        rl={"steps": STEPS, "prompts_per_step": 16, "group_size": 4, "max_staleness": 2, "learning_rate": 1e-4},
        generator={
            "min_engines": 1,
            "num_engines": 2,
            "num_cpus": 2,
            "threads": 1,
            "max_new_tokens": 24,
            "max_model_len": 48,
            "max_num_seqs": 4,
        },
        learner={"tokens_per_micro_batch": 512},
        placement=PLACEMENT,
    )


@pytest.fixture(scope="module")
def story(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("starving")
    job = write_job(folder, tiny_model(True))
    with growing_cluster({}, SECONDS_IDLE / 60) as cluster:
        name = cluster.submit(sys.executable, "-m", "pear_ray", "rl", str(job))
        told = cluster.succeeded(name)
        cluster.until_alone(20 * SECONDS_IDLE)
        yield Story(folder / "run", cluster, told)


@pytest.mark.timeout(1500)
def test_nodes_come_for_engines_and_go_within_their_limits(story: Story) -> None:
    counts = [one["generator"] for one in story.cluster.nodes_seen]
    assert counts[0] == counts[-1] == 0
    assert max(counts) == 2 and counts.index(1) < counts.index(2)
    assert max(one["learner"] for one in story.cluster.nodes_seen) == 1


def test_the_second_engine_comes_because_learners_wait(story: Story) -> None:
    events = [json.loads(line) for line in (story.run / "events.jsonl").open()]
    assert [event["kind"] for event in events].count("grown") == 1
    rows = [json.loads(line) for line in (story.run / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(STEPS))
