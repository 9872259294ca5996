"""Keys of stage `cooperate`, arms that end with it, and labels of checkpoints."""

from __future__ import annotations

import pytest

from pear_ray.config import TRAINING_STAGES, Arm, Cooperate, Job, is_after_rl, start_of
from tests.config.mistakes import assert_one_mistake, job_of

BRIDGE = {"method": "bridge"}
TRAPO = {"method": "trapo"}


def method(kind, **keys):
    return {"method": {"type": kind, **keys}}


# Keys of [cooperate], and the mistake.
COOPERATE_MISTAKES = [
    ({"method": "mix"}, "method: expected one of 'sum', 'alternate', 'bridge', 'trapo', got 'mix'"),
    ({"share": 0.5}, "share: unknown key, got 0.5; expected one of: entropy_top_frac"),
    (method("sum", rl_weight=1.5), "method.rl_weight: expected less than or equal to 1"),
    (method("sum", rl_weight_final=-0.1), "method.rl_weight_final: expected greater than or"),
    ({"entropy_top_frac": 0}, "entropy_top_frac: expected greater than 0, got 0"),
    (method("alternate", frozen_frac=1), "method.frozen_frac: expected less than 1, got 1"),
    (method("sum", frozen_frac=0.5), "method.frozen_frac: unknown key, got 0.5"),
    *(
        (method("trapo", **{key: 1}), f"method.{key}: unknown key")
        for key in ("lora_learning_rate", "meta_objective", "refresh_steps", "shadow_offload", "rl_weight")
    ),
    (method("alternate", rl_weight_final=0.2), "method.rl_weight_final: unknown key, got 0.2"),
    *(
        (method("sum", **{key: [1, 1, 1, 1]}), f"method.{key}: unknown key")
        for key in ("prefix_groups", "prefix_fracs", "prefix_returns")
    ),
    ({**TRAPO, "traces": "failed"}, 'traces: expected "all" with method "trapo", got \'failed\''),
    ({"failed_pass_rate": 0.25}, "failed_pass_rate: expected 0 with traces 'all', got 0.25"),
    ({"traces": "failed", "failed_pass_rate": 1}, "failed_pass_rate: expected less than 1, got 1"),
    (method("bridge", lora={"dropout": 0.1}), "method.lora.dropout: expected 0 beside trained weights, got 0.1"),
    (
        method("bridge", meta_objective=False, refresh_steps=5),
        "method.refresh_steps: expected 0 without meta_objective",
    ),
    (
        method("bridge", meta_objective=False, shadow_offload="parameters"),
        "method.shadow_offload: expected 'none' without meta_objective",
    ),
    (method("bridge", lora={"rank": 0}), "method.lora.rank: expected greater than 0, got 0"),
    (method("trapo", prefix_groups=[4, 4]), "method.prefix_fracs: expected 2 values"),
    (
        method("trapo", prefix_groups=[], prefix_fracs=[], prefix_returns=[]),
        "method.prefix_groups: expected at least 1 item",
    ),
    (method("trapo", prefix_groups=[4, 2, 2, 0]), "method.prefix_groups.3: expected greater than"),
    (method("trapo", prefix_fracs=[0, 0.2, 0.5, 1.2]), "method.prefix_fracs.3: expected less than"),
    ({"sft": {"objective": "kl"}}, "sft.objective: expected another objective"),
    ({"sft": {"normalize": "per_batch"}}, "sft.normalize: expected another value"),
    ({**TRAPO, "sft": {"negatives": True}}, "sft.negatives: expected false"),
    ({"traces": "failed", "sft": {"negatives": True}}, "sft.negatives: expected false"),
    *(
        ({"sft": {key: value}}, f"sft.{key}: expected none")
        for key, value in (("learning_rate", 1e-3), ("epochs", 2), ("schedule", "linear"))
    ),
    ({"sft": {"levle": "none"}}, "sft.levle: unknown key, got 'none'"),
    ({"sft": {"level": "none", "control": "centered"}}, 'sft.control: expected "none" with level "none"'),
    ({"sft": "plain"}, "sft: expected a table, got 'plain'"),
]
# [cooperate], other sections, and the mistake.
JOB_MISTAKES = [
    (TRAPO, {"rl": {"group_size": 4}}, "cooperate.method.prefix_groups: expected a sum of rl.gro"),
    (TRAPO, {"rl": {"loss": "nft"}}, "rl.loss: expected another loss"),
    (BRIDGE, {"learner": {"zero_stage": 2}}, "learner.zero_stage: expected 3 with cooperate.me"),
    (
        method("alternate", frozen_frac=0.1),
        {"learner": {"zero_stage": 2}},
        "learner.zero_stage: expected 3 with cooperate.method",
    ),
    (BRIDGE, {"learner": {"lora": {}}}, "learner.lora: expected none with cooperate.method"),
    (BRIDGE, {"learner": {"num_workers": 4, "min_workers": 2}}, "learner.min_workers: expected learner.num_workers 4"),
    ({}, {"sft": {"control": "mean_weight"}}, "cooperate.sft.control: expected another value"),
    (TRAPO, {"sft": {"negatives": True}}, "cooperate.sft.negatives: expected false"),
]
# Keys of an arm, [cooperate], and the mistake.
ARM_MISTAKES = [
    ({"cooperate": {"method": "mix"}}, None, "arms.a.cooperate.method: expected one of 'sum'"),
    ({"cooperate": {"methd": "sum"}}, None, "arms.a.cooperate.methd: unknown key, got 'sum'"),
    ({"cooperate": True}, None, "arms.0.cooperate: expected a table, got True"),
    (
        {"cooperate": TRAPO, "rl": {"group_size": 16}},
        None,
        "arms.a.cooperate.method.prefix_groups: expected a sum of rl.group_size 16",
    ),
    (
        {"cooperate": {"traces": "failed"}, "sft": {"negatives": True}},
        None,
        "arms.a.cooperate.sft.negatives: expected false",
    ),
    (
        {"cooperate": {"traces": "all"}},
        {"traces": "failed", "failed_pass_rate": 0.5},
        "arms.a.cooperate.failed_pass_rate: expected 0 with traces 'all'",
    ),
]


@pytest.mark.parametrize(("keys", "expected"), COOPERATE_MISTAKES, ids=str)
def test_a_mistake_in_cooperate_is_refused(keys, expected):
    assert_one_mistake(f"cooperate.{expected}", cooperate=keys)


@pytest.mark.parametrize(("keys", "sections", "expected"), JOB_MISTAKES, ids=str)
def test_sections_that_do_not_fit_cooperate_are_refused(keys, sections, expected):
    assert_one_mistake(expected, cooperate=keys, **sections)


@pytest.mark.parametrize(("keys", "cooperate", "expected"), ARM_MISTAKES, ids=str)
def test_a_mistake_in_an_arms_cooperate_is_refused(keys, cooperate, expected):
    assert_one_mistake(expected, arms=[{"name": "a", **keys}], cooperate=cooperate)


# Keys of [cooperate] as a job may give them; they and the defaults read back.
GOOD = [
    {},
    method("sum", rl_weight=0.2, rl_weight_final=1.0),
    {**method("alternate", frozen_frac=0.5), "traces": "failed", "failed_pass_rate": 0.25, "entropy_top_frac": 0.2},
    method("bridge", refresh_steps=20, shadow_offload="optimizer", lora={"rank": 4}),
    method("bridge", meta_objective=False),
    method("trapo", prefix_groups=(6, 2), prefix_fracs=(0.0, 0.5), prefix_returns=(-1.0, 0.5)),
    {"sft": {"level": "sequence", "normalize": "per_sequence", "examples_per_step": 8}},
]


@pytest.mark.parametrize("keys", GOOD, ids=str)
def test_valid_settings_read_back(keys):
    job = job_of(cooperate=keys)
    assert Job.model_validate_json(job.model_dump_json()) == job
    found = job.cooperate.model_dump()
    assert found == found | {key: value for key, value in keys.items() if key != "method"}
    own = keys.get("method", {"type": "sum"})
    for key, value in own.items():
        known = found["method"][key]
        assert known == (known | value if isinstance(value, dict) else value)
    assert job.last_stage_of("") == "cooperate"


def test_the_final_rl_weight_is_by_default_the_first():
    assert Cooperate(method="sum").method.rl_weight_final == 0.5
    assert Cooperate(**method("bridge", rl_weight=0.7)).method.rl_weight_final == 0.7
    assert Cooperate(**method("sum", rl_weight_final=0.0)).method.rl_weight_final == 0.0


@pytest.mark.parametrize(
    ("keys", "objective"), [({}, "dft"), (TRAPO, "trsft"), ({**TRAPO, "sft": {"objective": "nll"}}, "nll")], ids=str
)
def test_the_objective_on_traces_is_that_of_method_section_or_sft(keys, objective):
    job = job_of(sft={"objective": "dft", "epochs": 3}, cooperate=keys)
    own = job.cooperate.sft_of(job.sft)
    assert (own.objective.type, own.epochs, own.level) == (objective, 3, "token")


def test_arms_end_with_either_stage():
    job = job_of(
        cooperate={"entropy_top_frac": 0.7},
        arms=[
            {"name": "after"},
            {"name": "both", "cooperate": {}},
            {"name": "bridge", "sft": False, "cooperate": BRIDGE, "rl": {"steps": 3}},
        ],
    )
    assert [arm.stages for arm in job.arms] == [
        ("sft", "rl"), ("sft", "cooperate"), ("cooperate",),
    ]  # fmt: skip
    after, both, bridge = (job.of_arm(arm) for arm in job.arms)
    assert after.cooperate is None and after.last_stage_of("") == "rl"
    assert both.cooperate == job.cooperate
    assert (bridge.cooperate.method.type, bridge.cooperate.entropy_top_frac) == ("bridge", 0.7)
    assert bridge.rl.steps == 3
    assert [job.last_stage_of(home) for home in ("after", "both@3", "bridge@3")] == [
        "rl", "cooperate", "cooperate",
    ]  # fmt: skip


def test_labels_name_the_stage_before():
    labels = ["base", "a/sft", "a/cooperate", "b@1/cooperate", "cooperate", "sft", "mine"]
    assert [is_after_rl(label) for label in labels] == [
        False, False, True, True, True, False, False,
    ]  # fmt: skip
    assert [start_of(label, labels) for label in labels] == [
        None, "base", "a/sft", "base", "sft", "base", None,
    ]  # fmt: skip
    assert set(Arm(name="a", cooperate={}).stages) <= set(TRAINING_STAGES)
