"""The cluster's files: valid for whoever reads them, and agreeing with each other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pear_ray.metrics import METRIC_HELP

ROOT = Path(__file__).parents[2]
KUBERAY, VM = ROOT / "cluster/kuberay", ROOT / "cluster/vm"
# The CRDs that KubeRay publishes, one file each; far too large to keep a copy here.
SCHEMAS = Path(os.environ.get("PEAR_RAY_CRD_FOLDER", ROOT.parent / "shared/schemas"))
STEP_METRICS = {"pear_ray_step", "pear_ray_step_time_seconds"}
EVENT_METRICS = {"pear_ray_events_total", "pear_ray_event_time_seconds"}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def cluster_spec() -> dict[str, Any]:
    (job,) = documents(KUBERAY / "rayjob.yaml")
    return job["spec"]["rayClusterSpec"]


def containers() -> list[dict[str, Any]]:
    spec = cluster_spec()
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [one for group in groups for one in group["template"]["spec"]["containers"]]


def closed(schema: Any) -> Any:
    """The same schema, refusing keys that it does not name, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    if "properties" in found and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


@pytest.mark.skipif(
    not SCHEMAS.is_dir(), reason="KubeRay's CRDs (2 MB) are not kept here: PEAR_RAY_CRD_FOLDER names a folder of them"
)
@pytest.mark.parametrize(("file", "crd"), [("rayjob.yaml", "rayjobs"), ("raycluster.yaml", "rayclusters")])
def test_kuberay_accepts_them(file, crd):
    (definition,) = documents(SCHEMAS / f"ray.io_{crd}.yaml")
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    spec = closed(schema["properties"]["spec"])
    (document,) = documents(KUBERAY / file)
    jsonschema.Draft7Validator(spec).validate(document["spec"])
    with pytest.raises(jsonschema.ValidationError, match="headGroupSpecs"):
        broken = json.loads(json.dumps(document["spec"]).replace("headGroupSpec", "headGroupSpecs"))
        jsonschema.Draft7Validator(spec).validate(broken)


def test_the_cluster_that_stays_is_that_of_the_job():
    (cluster,) = documents(KUBERAY / "raycluster.yaml")
    assert cluster["spec"] == cluster_spec()


def test_what_they_refer_to_is_there():
    (job,) = documents(KUBERAY / "rayjob.yaml")
    storage = documents(KUBERAY / "storage.yaml")
    names = {(one["kind"], one["metadata"]["name"]) for one in storage}
    spec = job["spec"]["rayClusterSpec"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        if "priorityClassName" in pod:
            assert ("PriorityClass", pod["priorityClassName"]) in names
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert [("PersistentVolumeClaim", claim) in names for claim in claims] == [True]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    _, stage, file, _, run = job["spec"]["entrypoint"].split()
    assert stage == "pipeline"
    assert (ROOT / Path(file).relative_to("/opt/pear_ray")).exists()
    assert run == job["spec"]["metadata"]["run_dir"]
    mounted = [mount["mountPath"] for one in containers() for mount in one["volumeMounts"]]
    assert any(Path(run).is_relative_to(path) for path in mounted)
    (monitor,) = documents(KUBERAY / "monitor.yaml")
    wanted = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for container in containers():
        assert wanted <= {port["name"] for port in container["ports"]}


def test_pods_give_notice_and_go_within_their_grace():
    for group in cluster_spec()["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        *_, script = container["lifecycle"]["preStop"]["exec"]["command"]
        assert "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION" in script
        assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
        waits = [int(seconds) for seconds in re.findall(r"(?:timeout|seq) (\d+)", script)]
        assert len(waits) == 2
        assert sum(waits) < pod["terminationGracePeriodSeconds"]


def test_every_file_names_the_same_image_and_ray():
    lock = (ROOT / "docker/requirements-gpu.lock").read_text()
    (locked,) = re.findall(r"^ray(?:\[.*\])?==(\S+)", lock, re.MULTILINE)
    assert cluster_spec()["rayVersion"] == locked
    images = {one["image"] for one in containers()}
    images |= {c["docker"]["image"] for c in vm_configs().values() if "docker" in c}
    (image,) = images
    assert f"-t {image} " in (ROOT / "docker/README.md").read_text()


def test_the_job_asks_for_roles_that_nodes_have_and_for_no_more_than_a_node_holds():
    job = tomllib.loads((ROOT / "jobs/many-nodes.toml").read_text())
    groups = {group["groupName"]: group for group in cluster_spec()["workerGroupSpecs"]}
    ranks, engines = job["learner"], job["generator"]
    for name, num, num_cpus, num_gpus in (
        ("learners", ranks["num_workers"], ranks["cpus_per_worker"], 1),
        ("generators", engines["num_engines"], engines["num_cpus"], engines["num_gpus"]),
    ):
        group = groups[name]
        assert job["placement"][name].items() <= group["labels"].items()
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        fit = min(int(limits["cpu"]) // num_cpus, int(limits["nvidia.com/gpu"]) // num_gpus)
        assert fit >= 1
        assert fit * group["maxReplicas"] >= num
        for config in (vm_configs()[file] for file in ("aws.yaml", "gcp.yaml")):
            node = config["available_node_types"][name]
            assert job["placement"][name].items() <= node["labels"].items()
            fit = min(node["resources"]["CPU"] // num_cpus, node["resources"]["GPU"] // num_gpus)
            assert fit * node["max_workers"] >= num


def vm_configs() -> dict[str, dict[str, Any]]:
    return {path.name: documents(path)[0] for path in VM.glob("*.yaml")}


@pytest.mark.parametrize("file", ["aws.yaml", "gcp.yaml", "on-premise.yaml"])
def test_ray_up_accepts_them(file):
    config = vm_configs()[file]
    validate_config(prepare_config(config))
    with pytest.raises(jsonschema.ValidationError, match="head_node_types"):
        validate_config({**prepare_config(config), "head_node_types": "head"})


@pytest.mark.parametrize("file", ["aws.yaml", "gcp.yaml", "on-premise.yaml"])
def test_machines_start_with_a_token_and_a_dashboard_on_loopback(file):
    config = vm_configs()[file]
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\bray_[a-z_0-9]+", expression))


def expressions() -> list[str]:
    dashboard = json.loads((ROOT / "cluster/grafana/pear_ray.json").read_text())
    (group,) = documents(ROOT / "cluster/prometheus/rules.yml")[0]["groups"]
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return panels + [rule["expr"] for rule in group["rules"]]


def test_dashboards_and_rules_ask_for_metrics_that_stages_tell():
    told = {f"pear_ray_{stage}_{name}" for stage, names in METRIC_HELP.items() for name in names}
    told |= {f"pear_ray_engine_{name}_total" for name in METRIC_HELP["engine"]}
    told |= STEP_METRICS | EVENT_METRICS
    asked = set().union(*map(metrics_in, expressions()))
    ours = {name.removeprefix("ray_") for name in asked if name.startswith("ray_pear_ray_")}
    assert ours <= told
    assert len(ours) > 40


def test_the_dashboard_can_be_imported_as_it_is():
    dashboard = json.loads((ROOT / "cluster/grafana/pear_ray.json").read_text())
    assert {v["name"] for v in dashboard["templating"]["list"]} == {"datasource", "run"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["datasource"]["uid"] == "${datasource}"
