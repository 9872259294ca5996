"""What a job says of training: mistakes are named, and a preset says what the job does not."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from pear_ray.__main__ import resolve
from pear_ray.config import Arm, Job, Learner, Sft, format_validation_error

DOCUMENT = {
    "run": {"dir": "runs/one"},
    "model": {"path": "./model"},
    "generator": {"max_new_tokens": 8, "max_model_len": 16},
    "tasks": [{"name": "countdown"}],
}
SHORT = {"preset": "short_answers"}
LORA = ("learner", "lora")


def job_of(**sections):
    return Job(**DOCUMENT, **sections)


NO_WEIGHTS = 'with level "none", which has no weights; expected another level'
# What is wrong: (section, its keys, what the message says).
MISTAKES = {
    **{
        f"bounds of {name} in the wrong order": (
            ("sft",),
            {name: bounds},
            [f"{name}: read {bounds}; expected the lower bound first"],
        )
        for name, bounds in (
            ("clip_log_ratio", [0.3, -0.08]),
            ("clip_log_weight", [5.0, -10.0]),
            ("iw_bounds", [16.0, 0.0]),
        )
    },
    "equal bounds": (
        ("sft",),
        {"clip_log_weight": [1.0, 1.0]},
        ["clip_log_weight: read [1.0, 1.0]; expected the lower bound first"],
    ),
    "no weights to normalize": (
        ("sft",),
        {"level": "none", "normalize": "per_batch"},
        [f"normalize: read 'per_batch' {NO_WEIGHTS}"],
    ),
    "no weights to control": (
        ("sft",),
        {"level": "none", "control": "shuffled"},
        [f"control: read 'shuffled' {NO_WEIGHTS}"],
    ),
    **{
        f"{control} of weights {normalize}": (
            ("sft",),
            {"control": control, "normalize": normalize},
            [f"control and normalize: read '{control}' and '{normalize}'; expected one of them"],
        )
        for control, normalize in (
            ("mean_weight", "per_batch"),
            ("shuffled", "per_sequence"),
            ("centered", "per_batch"),
        )
    },
    "less than no epochs": (("sft",), {"epochs": -1}, [".epochs:", "greater than 0; read -1"]),
    "half an epoch": (("sft",), {"epochs": 0.5}, [".epochs:", "valid integer", "read 0.5"]),
    "an unknown objective": (
        ("sft",),
        {"objective": "ppo"},
        [".objective:", "'nll', 'kl', 'dft', 'iw', 'sed' or 'trsft'; read 'ppo'"],
    ),
    "an unknown level": (("sft",), {"level": "word"}, [".level:", "'block'", "read 'word'"]),
    "an unknown preset": (
        ("sft",),
        {"preset": "long_answers"},
        [".preset:", "'short_answers'; read 'long_answers'"],
    ),
    "an unknown key beside a preset": (
        ("sft",),
        {**SHORT, "clip": [0, 1]},
        [".clip: unknown key; expected one of: ", "clip_log_ratio", "read [0, 1]"],
    ),
    "everything decided": (
        ("sft",),
        {"sed_decided_frac": 1.0},
        [".sed_decided_frac:", "less than 1; read 1.0"],
    ),
    "no likeliest token": (("sft",), {"sed_top_k": 0}, [".sed_top_k:", "greater than 0; read 0"]),
    "no trust at all": (("sft",), {"trsft_alpha": 0}, [".trsft_alpha:", "greater than 0; read 0"]),
    "more than certain": (
        ("sft",),
        {"trsft_alpha": 1.5},
        [".trsft_alpha:", "less than or equal to 1; read 1.5"],
    ),
    "traces pushed up": (
        ("sft",),
        {"negative_coefficient": -0.1},
        [".negative_coefficient:", "greater than 0; read -0.1"],
    ),
    "nothing in memory": (
        ("sft",),
        {"rows_per_window": 0},
        [".rows_per_window:", "greater than 0; read 0"],
    ),
    "one beta": (("sft",), {"betas": [0.9]}, [".betas", "required; read [0.9]"]),
    "a third beta": (
        ("sft",),
        {"betas": [0.9, 0.99, 0.999]},
        [".betas", "read [0.9, 0.99, 0.999]"],
    ),
    **{
        f"a beta of {beta}": (("sft",), {"betas": [0.9, beta]}, ["betas", "read", str(beta)])
        for beta in (1.0, -0.1)
    },
    "a warm-up that never ends": (
        ("sft",),
        {"warmup_fraction": 1.0},
        [".warmup_fraction:", "less than 1; read 1.0"],
    ),
    **{
        f"parameters offloaded at stage {stage}": (
            ("learner",),
            {"offload": "parameters", "zero_stage": stage},
            [f'offload "parameters" needs zero_stage 3, which partitions them; read {stage}'],
        )
        for stage in (0, 1, 2)
    },
    "the optimizer offloaded at stage 0": (
        ("learner",),
        {"offload": "optimizer", "zero_stage": 0},
        ['offload "optimizer" needs zero_stage 1 or more; read 0'],
    ),
    "offloaded to nowhere": (
        ("learner",),
        {"offload": "nvme"},
        [".offload:", "'none', 'optimizer' or 'parameters'; read 'nvme'"],
    ),
    "a stage that there is not": (
        ("learner",),
        {"zero_stage": 4},
        [".zero_stage:", "0, 1, 2 or 3; read 4"],
    ),
    "fewer ranks than the fewest": (
        ("learner",),
        {"num_workers": 2, "min_workers": 3},
        ["min_workers 3 is more than num_workers 2"],
    ),
    **{
        f"{name} that cannot share packs": (
            ("learner",),
            {"num_workers": 4, "sequence_parallel": 2, name: 3},
            [f"{name} 3 cannot be dealt into groups of sequence_parallel 2"],
        )
        for name in ("num_workers", "min_workers")
    },
    "fewer ranks than share packs": (
        ("learner",),
        {"num_workers": 4, "min_workers": 2, "sequence_parallel": 2},
        ["min_workers 2: ranks that share packs go together; expected num_workers, 4"],
    ),
    "nobody to distil from": (
        ("sft",),
        {"objective": "kl"},
        ['sft.objective: read "kl", which needs', "corpus.top_logprobs 0; expected at least 1"],
    ),
    "no ranks": (("learner",), {"min_workers": 0}, [".min_workers:", "greater than 0; read 0"]),
    "no memory for logits": (
        ("learner",),
        {"logits_mib": 0},
        [".logits_mib:", "greater than 0; read 0"],
    ),
    "micro-batches without room": (
        ("learner",),
        {"tokens_per_micro_batch": 15},
        [
            "learner.tokens_per_micro_batch 15 (shared by 1) cannot hold",
            "generator.max_model_len 16",
        ],
    ),
    "adapters of rank 0": (LORA, {"rank": 0}, [".rank:", "greater than 0; read 0"]),
    "adapters of nothing": (LORA, {"alpha": 0}, [".alpha:", "greater than 0; read 0"]),
    "adapters nowhere": (LORA, {"targets": []}, [".targets:", "at least 1 item"]),
    "everything dropped": (LORA, {"dropout": 1.0}, [".dropout:", "less than 1; read 1.0"]),
    "an unknown key of adapters": (
        LORA,
        {"r": 16},
        [".r: unknown key; expected one of: alpha, dropout, rank, targets; read 16"],
    ),
}


@pytest.mark.parametrize(("section", "keys", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_what_was_read_and_expected(section, keys, said):
    given = keys
    for name in reversed(section):
        given = {name: given}
    with pytest.raises(ValidationError) as refusal:
        job_of(**given)
    line = format_validation_error("job.toml", refusal.value, Job)
    assert line.startswith("job.toml: ") and len(line.splitlines()) == 1
    for part in (".".join(section), *said):
        assert part in line, line


GOOD = {
    "an arm without weights": {"sft": {"level": "none"}},
    "one of the controls": {"sft": {"control": "centered", "normalize": "none"}},
    "ends of the ranges": {"sft": {"trsft_alpha": 1.0, "discount": 1.0, "sed_strength": 0}},
    "as few ranks as there are": {"learner": {"num_workers": 2, "min_workers": 2}},
    "all offloaded": {"learner": {"offload": "parameters", "zero_stage": 3}},
    "states offloaded": {"learner": {"offload": "optimizer", "zero_stage": 1}},
    "adapters": {"learner": {"lora": {"rank": 1, "targets": ["q_proj"]}}},
    "adapters as they are": {"learner": {"lora": {}}},
}


@pytest.mark.parametrize("sections", GOOD.values(), ids=GOOD)
def test_what_fits_together_is_taken_and_reads_back(sections):
    job = job_of(**sections)
    assert Job.model_validate_json(job.model_dump_json()) == job
    for name, keys in sections.items():
        found = json.loads(getattr(job, name).model_dump_json())
        assert found == found | {key: value for key, value in keys.items() if key != "lora"}


def test_what_is_not_said_is_the_papers_and_trains_no_adapters():
    sft, learner = Sft(), Learner()
    assert (sft.objective, sft.level, sft.normalize, sft.control) == (
        "nll",
        "token",
        "none",
        "none",
    )
    assert (sft.ratio_bounds, sft.clip_log_weight) == ((-0.08, 0.3), (-10.0, 5.0))
    assert (learner.lora, learner.offload, learner.zero_stage) == (None, "none", 3)


def test_a_preset_says_what_is_not_given():
    sft = Sft(**SHORT)
    assert sft.ratio_bounds == (-0.5, 0.5)
    assert Sft(preset=None).ratio_bounds == (-0.08, 0.3)


@pytest.mark.parametrize("bounds", [(-0.08, 0.3), (-1.0, 2.0)])
def test_what_is_given_wins_over_a_preset(bounds):
    assert Sft(**SHORT, clip_log_ratio=bounds).ratio_bounds == bounds
    assert Sft(clip_log_ratio=list(bounds), **SHORT).ratio_bounds == bounds


@pytest.mark.parametrize("keys", [SHORT, {**SHORT, "clip_log_ratio": (-0.08, 0.3)}], ids=str)
def test_a_preset_reads_back(keys):
    sft, job = Sft(**keys), job_of(sft=keys)
    for again in (
        Sft(**sft.model_dump()),
        Sft(**sft.model_dump(exclude_unset=True)),
        Sft.model_validate_json(sft.model_dump_json()),
        Job(**job.model_dump()).sft,
        Job.model_validate_json(job.model_dump_json()).sft,
    ):
        assert again == sft
        assert again.ratio_bounds == keys.get("clip_log_ratio", (-0.5, 0.5))


# (what the job says, what its arm says, the arm's clip)
ARMS = {
    "the arm's preset": ({}, SHORT, (-0.5, 0.5)),
    "the arm's preset among other keys": (
        {"epochs": 3, "clip_log_weight": (-4.0, 2.0)},
        {**SHORT, "level": "block"},
        (-0.5, 0.5),
    ),
    "the arm's own bounds": ({}, {**SHORT, "clip_log_ratio": (-1.0, 2.0)}, (-1.0, 2.0)),
    "the job's own bounds": ({"clip_log_ratio": (-1.0, 2.0)}, SHORT, (-1.0, 2.0)),
    "the job's preset": (SHORT, {"level": "block"}, (-0.5, 0.5)),
    "the arm's bounds against the job's preset": (
        SHORT,
        {"clip_log_ratio": (-0.08, 0.3)},
        (-0.08, 0.3),
    ),
    "no preset": ({"epochs": 3}, {"level": "block"}, (-0.08, 0.3)),
}


@pytest.mark.parametrize(("jobs", "arms", "expected"), ARMS.values(), ids=ARMS)
def test_an_arm_gets_what_its_preset_says(jobs, arms, expected):
    job = job_of(sft=jobs, arms=[{"name": "own", "sft": arms}])
    own = job.of_arm(job.arms[0]).sft
    assert own.ratio_bounds == expected
    assert own.model_dump(exclude={"clip_log_ratio"}) == {
        **Sft(**{**jobs, **arms}).model_dump(exclude={"clip_log_ratio"})
    }


def test_an_arms_job_reads_back_with_its_preset():
    job = job_of(arms=[{"name": "own", "sft": SHORT}])
    own = job.of_arm(job.arms[0])
    assert Job.model_validate_json(own.model_dump_json()) == own


@pytest.mark.parametrize("words", [[], ["--run.dir", "elsewhere"], ["--sft.epochs", "3"]], ids=str)
def test_a_preset_of_an_arm_bears_overrides_of_other_keys(tmp_path, words):
    path = tmp_path / "job.json"
    arms = [{"name": "own", "sft": SHORT}]
    path.write_text(json.dumps(DOCUMENT | {"arms": arms}))
    job = resolve("sft", path, words)
    assert job.of_arm(job.arms[0]).sft.ratio_bounds == (-0.5, 0.5)


def test_a_preset_of_an_arm_bears_that_the_job_is_written_down():
    """RUN/config.json is a job too."""
    written = job_of(arms=[{"name": "own", "sft": SHORT}]).model_dump_json()
    job = Job.model_validate_json(written)
    assert job.of_arm(job.arms[0]).sft.ratio_bounds == (-0.5, 0.5)


def test_a_preset_may_be_an_override(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(DOCUMENT))
    job = resolve("sft", path, ["--sft.preset", "short_answers"])
    assert job.sft.ratio_bounds == (-0.5, 0.5)
    words = ["--sft.preset", "short_answers", "--sft.clip-log-ratio", "-0.25", "1"]
    assert resolve("sft", path, words).sft.ratio_bounds == (-0.25, 1.0)


def test_a_mistake_in_an_arm_with_a_preset_is_named():
    arms = [Arm(name="own", sft={**SHORT, "level": "none", "control": "shuffled"})]
    with pytest.raises(ValidationError, match=r"arms\.own\.sft: .*control: read 'shuffled'"):
        job_of(arms=arms)


def test_an_arm_may_go_without_sft():
    job = job_of(arms=[{"name": "none", "sft": False}, {"name": "own", "sft": SHORT}])
    assert [arm.stages for arm in job.arms] == [("rl",), ("sft", "rl")]
    assert job.of_arm(job.arms[0]).sft == job.sft
    assert Job.model_validate_json(job.model_dump_json()) == job


@pytest.mark.parametrize("sft", [True, "none", 1])
def test_an_arms_sft_is_a_table_or_false(sft):
    with pytest.raises(ValidationError, match=r"arms\.0\.sft"):
        job_of(arms=[{"name": "own", "sft": sft}])
