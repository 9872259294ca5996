"""What a job says of RL, engines and tasks: mistakes are named when the job is read."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pear_ray.config import Job, Rl, format_validation_error
from pear_ray.errors import ConfigError
from pear_ray.preflight import check_inputs

DOCUMENT = {
    "run": {"dir": "runs/one"},
    "model": {"path": "./model"},
    "generator": {"max_new_tokens": 8, "max_model_len": 16},
    "tasks": [{"name": "countdown"}],
}
ENGINE = DOCUMENT["generator"]
NO_EVALUATIONS = "and eval_every 0; expected evaluations that it can look at"

# What is wrong: (sections of the job, what the message says).
MISTAKES = {
    "no steps": ({"rl": {"steps": 0}}, ["rl.steps:", "greater than 0; read 0"]),
    "no problems": ({"rl": {"prompts_per_step": 0}}, ["rl.prompts_per_step:", "read 0"]),
    "a group of one": ({"rl": {"group_size": 1}}, ["rl.group_size:", "greater than 1; read 1"]),
    "an unknown loss": (
        {"rl": {"loss": "reinforce"}},
        ["rl.loss:", "'ppo', 'gspo', 'cispo' or 'nft'; read 'reinforce'"],
    ),
    "an unknown advantage": ({"rl": {"advantage": "gae"}}, ["rl.advantage:", "read 'gae'"]),
    "an unknown average": ({"rl": {"loss_agg": "batch"}}, ["rl.loss_agg:", "read 'batch'"]),
    "an unknown correction": (
        {"rl": {"importance_sampling": "tis"}},
        ["rl.importance_sampling:", "read 'tis'"],
    ),
    "bounds for a loss without": (
        {"rl": {"loss": "nft", "clip_ratio": [0.2, 0.2]}},
        ["rl: ", 'clip_ratio: loss "nft" clips nothing; expected none'],
    ),
    "a lower bound beyond 1": (
        {"rl": {"clip_ratio": [1.2, 0.2]}},
        ["clip_ratio: read [1.2, 0.2]; expected low from 0 to 1 and high of at least 0"],
    ),
    "an upper bound below 0": (
        {"rl": {"clip_ratio": [0.2, -0.1]}},
        ["clip_ratio: read [0.2, -0.1]; expected low from 0 to 1"],
    ),
    "one bound": ({"rl": {"clip_ratio": [0.2]}}, ["rl.clip_ratio", "read [0.2]"]),
    "a cap on nothing": (
        {"rl": {"is_cap": 3.0}},
        ["is_cap: read 3.0 with importance_sampling 'ratio'; expected \"truncated\""],
    ),
    "a cap of nothing": (
        {"rl": {"importance_sampling": "truncated", "is_cap": 0}},
        ["rl.is_cap:", "greater than 0; read 0"],
    ),
    "a negative KL": ({"rl": {"kl_coefficient": -0.1}}, ["rl.kl_coefficient:", "read -0.1"]),
    "learning ahead of sampling": ({"rl": {"max_staleness": -1}}, ["rl.max_staleness:", "read -1"]),
    "punished from before the start": (
        {"rl": {"overlong_buffer_tokens": 9}},
        ["rl.overlong_buffer_tokens: read 9; expected at most generator.max_new_tokens, 8"],
    ),
    "punished where rewards are 0 and 1": (
        {"rl": {"loss": "nft", "overlong_buffer_tokens": 4}},
        ['overlong_buffer_tokens: read 4; loss "nft" wants rewards of 0 and 1, expected 0'],
    ),
    "answers neither kept nor masked": ({"rl": {"overlong": "drop"}}, ["rl.overlong:", "'drop'"]),
    "an end that nothing brings": (
        {"rl": {"early_stopping_patience": 3}},
        [f"early_stopping_patience: read 3, {NO_EVALUATIONS}"],
    ),
    "a goal that nothing measures": (
        {"rl": {"target_pass_rate": 0.5}},
        [f"target_pass_rate: read 0.5, {NO_EVALUATIONS}"],
    ),
    "a goal out of reach": (
        {"rl": {"target_pass_rate": 1.5, "eval_every": 2}},
        ["rl.target_pass_rate:", "less than or equal to 1; read 1.5"],
    ),
    "recorded and replayed": (
        {"rl": {"replay": "there", "record": True}},
        ["record: read True, and replay 'there', which starts no engine; expected one of them"],
    ),
    "evaluated without engines": (
        {"rl": {"replay": "there", "eval_every": 5}},
        ["eval_every: read 5, and replay 'there', which starts no engine"],
    ),
    "cold": ({"rl": {"temperature": 0}}, ["rl.temperature:", "greater than 0; read 0"]),
    "more ranks than answers": (
        {"rl": {"prompts_per_step": 1, "group_size": 2}, "learner": {"num_workers": 4}},
        ["rl.prompts_per_step 1 of 2 answers are fewer than learner.num_workers 4 can share"],
    ),
    "no engine": (
        {"generator": {**ENGINE, "num_engines": 0}},
        ["generator.num_engines:", "read 0"],
    ),
    "fewer engines than the fewest": (
        {"generator": {**ENGINE, "num_engines": 2, "min_engines": 3}},
        ["generator", "min_engines 3 is more than num_engines 2"],
    ),
    "no version is whole": ({"weights": {"full_every": 0}}, ["weights.full_every:", "read 0"]),
    "no bucket": ({"weights": {"bucket_mib": 0}}, ["weights.bucket_mib:", "read 0"]),
    "no verifier": ({"rewards": {"processes": 0}}, ["rewards.processes:", "read 0"]),
    "no time": (
        {"rewards": {"timeout_seconds": 0}},
        ["rewards.timeout_seconds:", "read 0"],
    ),
    "no weight": (
        {"tasks": [{"name": "countdown", "weight": 0}]},
        ["tasks.0.weight:", "greater than 0; read 0"],
    ),
}


@pytest.mark.parametrize(("sections", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_what_was_read_and_expected(sections, said):
    with pytest.raises(ValidationError) as refusal:
        Job(**DOCUMENT | sections)
    line = format_validation_error("job.toml", refusal.value, Job)
    assert line.startswith("job.toml: ") and len(line.splitlines()) == 1
    for part in said:
        assert part in line, line


def test_recorded_rollouts_that_are_not_there_are_named(tmp_path):
    job = Job(**DOCUMENT, rl={"replay": str(tmp_path / "none")})
    with pytest.raises(ConfigError) as refusal:
        check_inputs(job, "rl")
    assert str(refusal.value) == (
        f"rl.replay: read {str(tmp_path / 'none')!r}; expected a folder that exists,"
        " RUN/rl/rollouts of a run with rl.record"
    )


@pytest.mark.parametrize(
    ("keys", "clip"),
    [
        ({}, (0.2, 0.28)),
        ({"loss": "gspo"}, (3e-4, 4e-4)),
        ({"loss": "cispo"}, (1.0, 3.0)),
        ({"loss": "cispo", "clip_ratio": (0.5, 2.0)}, (0.5, 2.0)),
    ],
    ids=str,
)
def test_each_loss_has_its_usual_bounds(keys, clip):
    rl = Rl(**keys)
    assert rl.clip == clip
    assert Rl.model_validate_json(rl.model_dump_json()) == rl


def test_a_loss_without_bounds_can_be_asked_for_none():
    assert Rl(loss="nft").clip_ratio is None
