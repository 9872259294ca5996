"""What an arm changes in a union of tables, and what it keeps of the job."""

from __future__ import annotations

import pytest

from pear_ray.config import Job

BASE = {
    "run": {"dir": "runs/arms"},
    "model": {"path": "base"},
    "corpus": {"scored_path": "scored"},
    "tasks": [{"name": "countdown"}],
    "generator": {"max_new_tokens": 8, "max_model_len": 16},
}


def arm_of(arm, **sections):
    job = Job.model_validate(BASE | sections | {"arms": [{"name": "a", **arm}]})
    return job.of_arm(job.arms[0])


@pytest.mark.parametrize(
    ("change", "kind", "clip_ratio"),
    [
        ({"clip_ratio": [0.1, 0.2]}, "gspo", (0.1, 0.2)),
        ("gspo", "gspo", (0.3, 0.4)),
        ("cispo", "cispo", (1.0, 3.0)),
        ({"type": "ppo", "clip_ratio": [0.1, 0.1]}, "ppo", (0.1, 0.1)),
    ],
    ids=str,
)
def test_an_arm_keeps_the_type_of_a_loss_unless_it_names_another(change, kind, clip_ratio):
    arm = arm_of({"rl": {"loss": change}}, rl={"loss": {"type": "gspo", "clip_ratio": [0.3, 0.4]}})
    assert (arm.rl.loss.type, arm.rl.loss.clip_ratio) == (kind, clip_ratio)


def test_an_arm_keeps_the_type_of_an_objective():
    arm = arm_of({"sft": {"objective": {"alpha": 0.3}}}, sft={"objective": "trsft"})
    assert (arm.sft.objective.type, arm.sft.objective.alpha) == ("trsft", 0.3)


def test_a_key_derived_from_a_changed_one_follows_it():
    method = arm_of({"cooperate": {"method": {"rl_weight": 0.2}}}, cooperate={"method": "bridge"}).cooperate.method
    assert (method.type, method.rl_weight, method.rl_weight_final) == ("bridge", 0.2, 0.2)


def test_traces_of_trapo_keep_the_alpha_of_sft():
    job = arm_of(
        {"cooperate": {}}, sft={"objective": {"type": "trsft", "alpha": 0.3}}, cooperate={"method": "trapo"},
        rl={"group_size": 8},
    )  # fmt: skip
    assert job.cooperate.sft_of(job.sft).objective.alpha == 0.3
