"""Keys of RL, engines, rewards and tasks."""

from __future__ import annotations

import pytest

from pear_ray.config import Generator, Rl
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
