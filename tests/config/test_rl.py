"""Keys of RL, cooperate, engines, rewards and tasks; arms that end with cooperate, and labels of checkpoints."""

from __future__ import annotations

import pytest

from pear_ray.config import TRAINING_STAGES, Arm, Cooperate, Generator, Job, Rl, is_after_rl, start_of
from pear_ray.errors import ConfigError
from pear_ray.preflight import check_inputs
from tests.config.mistakes import DOCUMENT, assert_one_mistake, job_of

ENGINE = DOCUMENT["generator"]

# Keys of [rl], and the mistake.
RL_MISTAKES = [
    ({"steps": 0}, "steps: expected greater than 0, got 0"),
    ({"prompts_per_step": 0}, "prompts_per_step: expected greater than 0"),
    ({"group_size": 1}, "group_size: expected greater than 1, got 1"),
    ({"loss": "pg"}, "loss: expected one of 'ppo', 'gspo', 'cispo', 'nft', got 'pg'"),
    ({"loss": {"clip_ratio": [-0.1, 0.1]}}, "loss.clip_ratio.0: expected greater than or equal to"),
    ({"loss": 3}, "loss: expected "),
    ({"advantage": "gae"}, "advantage: expected 'grpo', 'dr_grpo' or 'rloo', got 'gae'"),
    ({"loss_agg": "batch"}, "loss_agg: expected 'token', 'sequence' or 'constant'"),
    ({"importance_sampling": "tis"}, "importance_sampling: expected one of 'ratio', 'truncated'"),
    (
        {"loss": {"type": "nft", "clip_ratio": [0.2, 0.2]}},
        "loss.clip_ratio: unknown key, got [0.2, 0.2]; expected one of: type",
    ),
    ({"clip_ratio": [0.2, 0.2]}, "clip_ratio: unknown key"),
    (
        {"loss": {"type": "ppo", "clip_ratio": [1.2, 0.2]}},
        "loss.clip_ratio.0: expected less than or equal to 1, got 1.2",
    ),
    (
        {"loss": {"type": "gspo", "clip_ratio": [0.2, -0.1]}},
        "loss.clip_ratio.1: expected greater than or equal to 0, got -0.1",
    ),
    ({"loss": {"type": "cispo", "clip_ratio": [0.2]}}, "loss.clip_ratio.1: missing"),
    ({"importance_sampling": {"type": "ratio", "cap": 3.0}}, "importance_sampling.cap: unknown key, got 3.0"),
    (
        {"importance_sampling": {"type": "truncated", "cap": 0}},
        "importance_sampling.cap: expected greater than 0, got 0",
    ),
    ({"kl_coefficient": -0.1}, "kl_coefficient: expected greater than or equal to 0, got -0.1"),
    ({"max_staleness": -1}, "max_staleness: expected greater than or equal to 0"),
    ({"overlong_buffer_tokens": 9}, "overlong_buffer_tokens: expected at most generator.max_new_tokens 8, got 9"),
    ({"loss": "nft", "overlong_buffer_tokens": 4}, 'overlong_buffer_tokens: expected 0 with loss "nft"'),
    ({"mask_truncated": "drop"}, "mask_truncated: expected a valid boolean"),
    ({"early_stopping_patience": 3}, "early_stopping_patience: expected none with eval_every 0, got 3"),
    ({"target_pass_rate": 0.5}, "target_pass_rate: expected none with eval_every 0, got 0.5"),
    ({"target_pass_rate": 1.5, "eval_every": 2}, "target_pass_rate: expected less than or equal to 1, got 1.5"),
    ({"replay": "there", "record": True}, "record: expected none with replay"),
    ({"replay": "there", "eval_every": 5}, "eval_every: expected none with replay"),
    ({"temperature": 0}, "temperature: expected greater than 0"),
]
# Sections, and the mistake.
MISTAKES = [
    (
        {"rl": {"prompts_per_step": 1, "group_size": 2}, "learner": {"num_workers": 4}},
        "rl.prompts_per_step: expected a completion for each of 4 ranks",
    ),
    ({"generator": {**ENGINE, "num_engines": 0}}, "generator.num_engines: expected greater than 0"),
    (
        {"generator": {**ENGINE, "num_engines": 2, "min_engines": 3}},
        "generator.min_engines: expected at most num_engines 2, got 3",
    ),
    (
        {"generator": {**ENGINE, "max_num_batched_tokens": 99}},
        "generator.max_num_batched_tokens: expected at least max_num_seqs 256",
    ),
    (
        {"generator": {**ENGINE, "max_new_tokens": 16}},
        "generator.max_new_tokens: expected less than max_model_len 16, got 16",
    ),
    ({"weights": {"full_every": 0}}, "weights.full_every: expected greater than 0"),
    ({"weights": {"bucket_mib": 0}}, "weights.bucket_mib: expected greater than 0"),
    ({"rewards": {"processes": 0}}, "rewards.processes: expected greater than 0"),
    ({"rewards": {"timeout_seconds": 0}}, "rewards.timeout_seconds: expected greater than"),
    ({"tasks": [{"name": "math", "weight": 0}]}, "tasks.0.weight: expected greater than 0, got 0"),
]


@pytest.mark.parametrize(("keys", "expected"), RL_MISTAKES, ids=str)
def test_a_mistake_in_rl_is_refused(keys, expected):
    assert_one_mistake(f"rl.{expected}", rl=keys)


@pytest.mark.parametrize(("sections", "expected"), MISTAKES, ids=str)
def test_a_mistake_in_another_section_is_refused(sections, expected):
    assert_one_mistake(expected, **sections)


def test_missing_rollouts_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^rl\.replay: expected RUN/rl/rollouts"):
        check_inputs(job_of(rl={"replay": str(tmp_path / "none")}), "rl")


@pytest.mark.parametrize(
    ("loss", "clip_ratio"),
    [
        ("ppo", (0.2, 0.28)),
        ("gspo", (3e-4, 4e-4)),
        ("cispo", (1.0, 3.0)),
        ({"type": "cispo", "clip_ratio": (0.5, 2.0)}, (0.5, 2.0)),
        ("nft", None),
    ],
    ids=str,
)
def test_each_loss_has_its_own_clip_ratio(loss, clip_ratio):
    rl = Rl(loss=loss)
    assert getattr(rl.loss, "clip_ratio", None) == clip_ratio
    assert Rl.model_validate_json(rl.model_dump_json()) == rl


def test_defaults_of_rl():
    rl = Rl()
    assert (rl.loss.type, rl.importance_sampling.type, rl.mask_truncated) == ("ppo", "ratio", False)
    assert Rl(importance_sampling="truncated").importance_sampling.cap == 2.0


@pytest.mark.parametrize(
    ("keys", "min_engines", "tokens"),
    [
        ({}, 1, 2048),
        ({"num_engines": 3, "num_gpus": 1}, 3, 8192),
        ({"num_engines": 3, "min_engines": 2, "max_num_batched_tokens": 512}, 2, 512),
    ],
    ids=str,
)
def test_engine_defaults_depend_on_other_keys(keys, min_engines, tokens):
    generator = Generator(**ENGINE, **keys)
    assert (generator.min_engines, generator.max_num_batched_tokens) == (min_engines, tokens)


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
