"""The whole chain, submitted from outside to a cluster that Ray's autoscaler grows and shrinks: where its parts run,
what comes out, who may look, what is watched."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.growing import ROOT, TOKEN, Growing, get, growing_cluster, prometheus
from tests.cluster.nodes import assert_evaluated_alike, assert_trained_alike, with_corpus_of
from tests.tiny_chain import TINY

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]

PROMETHEUS = shutil.which("prometheus")
SECRET = f"pl4nted{uuid.uuid4().hex}"
# Where hubs, clouds and services look for theirs.
SECRETS = dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"), SECRET)
SECONDS_IDLE = 6.0
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None, reason="prometheus is not installed (Debian's package of that name)"
)


@dataclass
class Story:
    """What was seen of the submitted run."""

    run: Path
    cluster: Growing
    job: dict[str, Any]
    num_seen_before_kill: int = 0
    """States of the nodes that were seen before the engine was killed."""
    told_on_the_way: list[dict[str, str]] = field(default_factory=list)
    series: set[str] = field(default_factory=set)
    """Metrics that Prometheus had, by name."""
    exposed: str = ""
    """All that it had, as text."""
    alerts: set[str] = field(default_factory=set)
    """Alerts that fired."""


def stages(run: Path) -> dict[str, Any]:
    path = run / "manifest.json"
    return json.loads(path.read_text())["stages"] if path.exists() else {}


def engines(cluster: Growing) -> list[int]:
    """Process ids of the vLLM engines that live."""
    actors = cluster.states("actors", "state=ALIVE")
    return [one["pid"] for one in actors if one["class_name"] == "EngineActor"]


def ask(address: str, what: str) -> Any:
    return get(f"{address}/api/v1/{what}")["data"]


@pytest.fixture(scope="module")
def story(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Models and corpus come from the run on one node, which has ended before."""
    run = with_corpus_of(tiny_run, tmp_path_factory.mktemp("submitted") / "run")
    with ExitStack() as stack:
        cluster = stack.enter_context(growing_cluster(SECRETS, SECONDS_IDLE / 60))
        watch = stack.enter_context(prometheus(cluster, PROMETHEUS)) if PROMETHEUS else None
        name = cluster.submit(
            sys.executable, "-m", "pear_ray", "pipeline", str(TINY), "--run.dir", str(run),
            "--placement.learners.pear-ray/role", "learner",
            "--placement.generators.pear-ray/role", "generator",
        )  # fmt: skip
        story = Story(run, cluster, {})
        cluster.until(lambda: (run / "arms/pear/metrics.jsonl").exists(), name)
        story.told_on_the_way.append(cluster.job(name)["metadata"])
        cluster.until(lambda: "evaluate" in stages(run), name)
        story.told_on_the_way.append(cluster.job(name)["metadata"])
        cluster.until(lambda: bool(engines(cluster)), name)
        story.num_seen_before_kill = len(cluster.nodes_seen)
        # As by a machine that runs out of memory.
        os.kill(engines(cluster)[0], signal.SIGKILL)
        if watch:
            cluster.until((run / "events.jsonl").exists, name)
            note_what_is_watched(story, watch)
        story.job = cluster.succeeded(name)
        cluster.until_alone(20 * SECONDS_IDLE)
        yield story


def note_what_is_watched(story: Story, watch: str) -> None:
    deadline = time.monotonic() + 60
    while not story.alerts and time.monotonic() < deadline:
        found = ask(watch, "alerts")["alerts"]
        story.alerts |= {one["labels"]["alertname"] for one in found if one["state"] == "firing"}
        time.sleep(1)
    story.series = set(ask(watch, "label/__name__/values"))
    everything = urllib.parse.quote('{__name__=~".+"}')
    with urllib.request.urlopen(f"{watch}/federate?match[]={everything}", timeout=60) as answer:
        story.exposed = answer.read().decode()


@pytest.mark.timeout(2000)
def test_the_cluster_grows_for_each_role_and_shrinks_to_its_head(story: Story) -> None:
    counts = story.cluster.nodes_seen
    nobody = {"learner": 0, "generator": 0}
    assert counts[0] == nobody and counts[-1] == nobody
    # The engine that replaces the killed one may ask for a node before the room of that one is free.
    before = counts[: story.num_seen_before_kill]
    assert {role: max(one[role] for one in before) for role in nobody} == {"learner": 1, "generator": 1}
    assert max(one["learner"] for one in counts) == 1


def test_roles_keep_to_their_nodes(story: Story) -> None:
    places = story.cluster.places_seen
    assert places["EngineActor"] == places["MapWorker(Map(Scorer))"] == {"generator"}
    assert places["RayTrainWorker"] == {"learner"}


def test_the_result_is_that_of_one_node(story: Story, tiny_run: Path) -> None:
    assert_trained_alike(story.run / "arms/pear", tiny_run / "arms/pear", ("sft", "rl"))
    assert_evaluated_alike(story.run, tiny_run)


def test_the_jobs_page_says_where_it_is_and_where_its_report_lies(story: Story) -> None:
    first, second = story.told_on_the_way
    assert first["run"] == str(story.run / "arms/pear") and first["stage"] in ("sft", "rl")
    assert second["run"] == str(story.run) and second["stage"] == "evaluate"
    report = story.run / "report/index.html"
    assert report.exists() and story.job["metadata"]["report"] == report.as_uri()


@needs_prometheus
def test_every_panel_and_alert_has_data(story: Story) -> None:
    files = ("grafana/pear_ray.json", "prometheus/rules.yml")
    texts = [(ROOT / "cluster" / file).read_text() for file in files]
    asked = {name for text in texts for name in re.findall(r"\bray_[a-z_0-9]+", text)}
    assert len(asked) > 50
    assert asked - story.series == set()


@needs_prometheus
def test_a_killed_engine_raises_its_alert(story: Story) -> None:
    assert story.alerts == {"PearRayEngineDied"}


def test_no_secret_of_the_environment_is_in_any_file_log_or_metric(story: Story) -> None:
    folders = (story.run, story.cluster.folder)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in story.exposed + json.dumps(story.job)


def test_the_token_belongs_to_its_owner_and_is_nowhere_else(story: Story) -> None:
    kept = story.cluster.folder / "token"
    assert kept.stat().st_mode & 0o777 == 0o600
    folders = (story.run, story.cluster.folder)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == [kept]
