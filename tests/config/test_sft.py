"""Keys of training: the optimizer, SFT, ranks, adapters; presets."""

from __future__ import annotations

import json

import pytest

from pear_ray.config import Job, Learner, Sft, read_job
from tests.config.mistakes import DOCUMENT, assert_one_mistake, job_of, mistakes_in

SHORT = {"preset": "short_answers"}

SFT_MISTAKES = [
    *(
        ({key: bounds}, f"{key}: expected the lower bound first, got {bounds}")
        for key, bounds in (
            ("clip_log_ratio", [0.3, -0.08]),
            ("clip_log_weight", [5.0, -10.0]),
            ("clip_log_weight", [1.0, 1.0]),
        )
    ),
    (
        {"objective": {"type": "iw", "bounds": [16.0, 0.0]}},
        "objective.bounds: expected the lower bound first, got [16.0, 0.0]",
    ),
    ({"level": "none", "normalize": "per_batch"}, 'normalize: expected "none" with level "none"'),
    ({"level": "none", "control": "shuffled"}, 'control: expected "none" with level "none"'),
    *(
        (
            {"control": control, "normalize": normalize},
            f"normalize: expected \"none\" with control '{control}', got '{normalize}'",
        )
        for control, normalize in (
            ("mean_weight", "per_batch"),
            ("shuffled", "per_sequence"),
            ("centered", "per_batch"),
        )
    ),
    ({"epochs": -1}, "epochs: expected greater than 0, got -1"),
    ({"epochs": 0.5}, "epochs: expected a valid integer, got 0.5"),
    ({"objective": "ppo"}, "objective: expected one of 'nll', 'kl', 'dft', 'iw', 'sed', 'trsft', got 'ppo'"),
    ({"level": "word"}, "level: expected 'none', 'token', 'block' or 'sequence', got 'word'"),
    ({"preset": "long_answers"}, "preset: expected 'short_answers', got 'long_answers'"),
    ({**SHORT, "clip": [0, 1]}, "clip: unknown key, got [0, 1]; expected one of: "),
    ({"objective": {"type": "sed", "decided_frac": 1.0}}, "objective.decided_frac: expected less than 1, got 1.0"),
    ({"objective": {"type": "sed", "top_k": 0}}, "objective.top_k: expected greater than 0"),
    ({"objective": {"type": "trsft", "alpha": 0}}, "objective.alpha: expected greater than 0"),
    ({"objective": {"type": "trsft", "alpha": 1.5}}, "objective.alpha: expected less than or"),
    ({"objective": {"type": "nll", "alpha": 0.5}}, "objective.alpha: unknown key, got 0.5; expected one of: type"),
    ({"negative_coefficient": -0.1}, "negative_coefficient: expected greater than 0, got -0.1"),
    ({"rows_per_window": 0}, "rows_per_window: expected greater than 0, got 0"),
    ({"betas": [0.9]}, "betas.1: missing"),
    ({"betas": [0.9, 0.99, 0.999]}, "betas: expected at most 2 items"),
    ({"betas": [0.9, 1.0]}, "betas.1: expected less than 1, got 1.0"),
    ({"betas": [0.9, -0.1]}, "betas.1: expected greater than or equal to 0, got -0.1"),
    ({"warmup_fraction": 1.0}, "warmup_fraction: expected less than 1, got 1.0"),
]
LEARNER_MISTAKES = [
    *(
        (
            {"offload": "parameters", "zero_stage": stage},
            f"zero_stage: expected at least 3 with offload 'parameters', got {stage}",
        )
        for stage in (0, 1, 2)
    ),
    ({"offload": "optimizer", "zero_stage": 0}, "zero_stage: expected at least 1 with offload"),
    ({"offload": "nvme"}, "offload: expected 'none', 'optimizer' or 'parameters', got 'nvme'"),
    ({"zero_stage": 4}, "zero_stage: expected 0, 1, 2 or 3, got 4"),
    ({"num_workers": 2, "min_workers": 3}, "min_workers: expected at most num_workers 2, got 3"),
    ({"num_workers": 3, "sequence_parallel": 2}, "num_workers: expected a multiple of sequence_parallel 2, got 3"),
    (
        {"num_workers": 4, "min_workers": 3, "sequence_parallel": 2},
        "min_workers: expected a multiple of sequence_parallel 2, got 3",
    ),
    (
        {"num_workers": 4, "min_workers": 2, "sequence_parallel": 2},
        "min_workers: expected num_workers 4 with sequence_parallel, got 2",
    ),
    ({"min_workers": 0}, "min_workers: expected greater than 0, got 0"),
    ({"logits_mib": 0}, "logits_mib: expected greater than 0, got 0"),
    ({"tokens_per_micro_batch": 15}, "tokens_per_micro_batch: expected room for a sequence"),
    ({"lora": {"rank": 0}}, "lora.rank: expected greater than 0, got 0"),
    ({"lora": {"alpha": 0}}, "lora.alpha: expected greater than 0, got 0"),
    ({"lora": {"targets": []}}, "lora.targets: expected at least 1 item, got []"),
    ({"lora": {"dropout": 1.0}}, "lora.dropout: expected less than 1, got 1.0"),
    ({"lora": {"r": 16}}, "lora.r: unknown key, got 16; expected one of: alpha, dropout, rank, targets"),
]


@pytest.mark.parametrize(("keys", "expected"), SFT_MISTAKES, ids=str)
def test_a_mistake_in_sft_is_refused(keys, expected):
    assert_one_mistake(f"sft.{expected}", sft=keys)


@pytest.mark.parametrize(("keys", "expected"), LEARNER_MISTAKES, ids=str)
def test_a_mistake_in_learner_is_refused(keys, expected):
    assert_one_mistake(f"learner.{expected}", learner=keys)


@pytest.mark.parametrize(
    ("sections", "where"),
    [({"sft": {"objective": "kl"}}, "sft"), ({"arms": [{"name": "a", "sft": {"objective": "kl"}}]}, "arms.a.sft")],
    ids=str,
)
def test_distillation_needs_top_logprobs(sections, where):
    expected = f'corpus.top_logprobs: expected at least 1 for {where}.objective "kl", got 0'
    assert mistakes_in(**sections) == [expected]
    job_of(**sections, corpus={"top_logprobs": 4})
    job_of(**sections, corpus={"scored_path": "scored"})


GOOD = [
    {"sft": {"level": "none"}},
    {"sft": {"control": "centered", "normalize": "none"}},
    {"sft": {"discount": 1.0, "objective": {"type": "trsft", "alpha": 1.0}}},
    {"sft": {"objective": {"type": "sed", "strength": 0, "top_k": 3, "decided_frac": 0.5}}},
    {"learner": {"num_workers": 2, "min_workers": 2}},
    {"learner": {"offload": "parameters", "zero_stage": 3}},
    {"learner": {"offload": "optimizer", "zero_stage": 1}},
    {"learner": {"lora": {"rank": 1, "targets": ["q_proj"]}}},
    {"learner": {"lora": {}}},
]


@pytest.mark.parametrize("sections", GOOD, ids=str)
def test_valid_settings_read_back(sections):
    job = job_of(**sections)
    assert Job.model_validate_json(job.model_dump_json()) == job
    for name, keys in sections.items():
        found = json.loads(getattr(job, name).model_dump_json())
        assert found == found | {key: value for key, value in keys.items() if key != "lora"}


def test_defaults_are_the_papers_without_adapters():
    sft, learner = Sft(), Learner()
    assert (sft.objective.type, sft.level, sft.normalize, sft.control) == (
        "nll", "token", "none", "none",
    )  # fmt: skip
    assert (sft.ratio_bounds, sft.clip_log_weight) == ((-0.08, 0.3), (-10.0, 5.0))
    assert (learner.lora, learner.offload, learner.zero_stage) == (None, "none", 3)
    assert (learner.min_workers, Learner(num_workers=4).min_workers) == (2, 4)


def test_objectives_keep_their_own_keys():
    sft = Sft(objective={"type": "iw", "temperature": 2})
    assert (sft.objective.temperature, sft.objective.bounds) == (2.0, (0.0, 16.0))
    sed, trsft = Sft(objective="sed").objective, Sft(objective="trsft").objective
    assert (sed.strength, sed.top_k, sed.decided_frac, trsft.alpha) == (1.0, 10, 0.7, 0.1)


# Keys of [sft], keys of the arm's, the arm's clip.
PRESETS = [
    ({}, SHORT, (-0.5, 0.5)),
    ({"epochs": 3, "clip_log_weight": (-4.0, 2.0)}, {**SHORT, "level": "block"}, (-0.5, 0.5)),
    ({}, {**SHORT, "clip_log_ratio": (-1.0, 2.0)}, (-1.0, 2.0)),
    ({"clip_log_ratio": (-1.0, 2.0)}, SHORT, (-1.0, 2.0)),
    (SHORT, {"level": "block"}, (-0.5, 0.5)),
    (SHORT, {"clip_log_ratio": (-0.08, 0.3)}, (-0.08, 0.3)),
    ({"epochs": 3}, {"level": "block"}, (-0.08, 0.3)),
]


@pytest.mark.parametrize(("keys", "own", "clip"), PRESETS, ids=str)
def test_a_preset_sets_the_clip_that_neither_job_nor_arm_sets(keys, own, clip):
    job = job_of(sft=keys, arms=[{"name": "own", "sft": own}])
    # RUN/config.json is a job too.
    for each in (job, Job.model_validate_json(job.model_dump_json())):
        sft = each.of_arm(each.arms[0]).sft
        assert sft.ratio_bounds == clip
        assert Sft.model_validate_json(sft.model_dump_json()) == sft
        assert sft.model_dump(exclude={"clip_log_ratio"}) == (
            Sft(**{**keys, **own}).model_dump(exclude={"clip_log_ratio"})
        )


def test_a_preset_may_be_an_override(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(DOCUMENT | {"arms": [{"name": "own", "sft": SHORT}]}))
    words = ["--sft.preset", "short_answers"]
    assert read_job(path, words).sft.ratio_bounds == (-0.5, 0.5)
    words += ["--sft.clip-log-ratio", "-0.25", "1"]
    assert read_job(path, words).sft.ratio_bounds == (-0.25, 1.0)
    job = read_job(path, ["--sft.epochs", "3"])
    assert job.of_arm(job.arms[0]).sft.ratio_bounds == (-0.5, 0.5)


def test_an_arm_may_skip_sft():
    job = job_of(arms=[{"name": "none", "sft": False}, {"name": "own", "sft": SHORT}])
    assert [arm.stages for arm in job.arms] == [("rl",), ("sft", "rl")]
    assert job.of_arm(job.arms[0]).sft == job.sft
    assert Job.model_validate_json(job.model_dump_json()) == job


@pytest.mark.parametrize("sft", [True, "none", 1])
def test_an_arms_sft_is_a_table_or_false(sft):
    assert set(mistakes_in(arms=[{"name": "own", "sft": sft}])) == {
        f"arms.0.sft: expected a table, got {sft!r}",
        f"arms.0.sft: expected False, got {sft!r}",
    }
