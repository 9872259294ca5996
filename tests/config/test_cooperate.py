"""What a job says of stage `cooperate`: mistakes are named when the command line reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pear_ray.__main__ import main
from pear_ray.config import TRAINING_STAGES, Arm, Job, is_after_rl, read_job, start_of

JOB = """
[run]
dir = "run"
[model]
path = "./model"
[corpus]
path = "corpus.jsonl"
[generator]
max_new_tokens = 8
max_model_len = 16
[[tasks]]
name = "countdown"
"""
NO_SHADOW = "without meta_objective, where there is no shadow; expected"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working folder with everything that the job names."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    for path in ("model/config.json", "model/tokenizer.json", "corpus.jsonl"):
        Path(path).write_text("{}")


@pytest.fixture
def dry_run(capsys):
    """Has the command line read a job with these lines: (exit code, printed, complained)."""

    def run(lines, *words):
        Path("job.toml").write_text(JOB + lines)
        with pytest.raises(SystemExit) as end:
            main(["cooperate", "job.toml", *words, "--dry-run"])
        return end.value.code, *capsys.readouterr()

    return run


# What is wrong: (lines of the job, what the message says).
MISTAKES = {
    "an unknown method": (
        "[cooperate]\nmethod = 'mix'",
        ["cooperate.method:", "'sum', 'alternate', 'bridge' or 'trapo'; read 'mix'"],
    ),
    "an unknown key": (
        "[cooperate]\nshare = 0.5",
        ["cooperate.share: unknown key; expected one of:", "rl_weight", "read 0.5"],
    ),
    "more than all": ("[cooperate]\nrl_weight = 1.5", ["cooperate.rl_weight:", "read 1.5"]),
    "less than nothing at the end": (
        "[cooperate]\nrl_weight_final = -0.1",
        ["cooperate.rl_weight_final:", "read -0.1"],
    ),
    "no token of any trace": (
        "[cooperate]\nentropy_top_frac = 0",
        ["cooperate.entropy_top_frac:", "greater than 0; read 0"],
    ),
    "everything frozen": (
        "[cooperate]\nmethod = 'alternate'\nfrozen_frac = 1",
        ["cooperate.frozen_frac:", "less than 1; read 1"],
    ),
    "frozen in one step of both": (
        "[cooperate]\nfrozen_frac = 0.5",
        ["frozen_frac: read 0.5 with method 'sum'; only 'alternate' has it"],
    ),
    **{
        f"{key} without BRIDGE": (
            f"[cooperate]\nmethod = 'trapo'\n{key} = {value}",
            [f"cooperate: Value error, {key}: read", "with method 'trapo'; only 'bridge' has it"],
        )
        for key, value in (
            ("lora", "{rank = 8}"),
            ("lora_learning_rate", "1e-4"),
            ("meta_objective", "false"),
            ("refresh_steps", "10"),
            ("shadow_offload", "'optimizer'"),
        )
    },
    **{
        f"{key} without TRAPO": (
            f"[cooperate]\n{key} = [1, 1, 1, 1]",
            [f"{key}: read (1", "with method 'sum'; only 'trapo' has it"],
        )
        for key in ("prefix_groups", "prefix_fracs", "prefix_returns")
    },
    **{
        f"a share of {method}": (
            f"[cooperate]\nmethod = '{method}'\nrl_weight_final = 0.2",
            [f"rl_weight: read 0.5 to 0.2 with method '{method}', which has no such share"],
        )
        for method in ("alternate", "trapo")
    },
    "failed problems with TRAPO": (
        "[cooperate]\nmethod = 'trapo'\ntraces = 'failed'",
        ["traces: read 'failed' with method \"trapo\"", 'expected "all"'],
    ),
    "failed, but all are learned": (
        "[cooperate]\nfailed_pass_rate = 0.25",
        ["failed_pass_rate: read 0.25 with traces 'all'; expected \"failed\""],
    ),
    "all have failed": (
        "[cooperate]\ntraces = 'failed'\nfailed_pass_rate = 1",
        ["cooperate.failed_pass_rate:", "less than 1; read 1"],
    ),
    "adapters beside weights that drop inputs": (
        "[cooperate]\nmethod = 'bridge'\nlora = {dropout = 0.1}",
        ["lora.dropout: read 0.1", "expected 0"],
    ),
    "a shadow of nothing is refreshed": (
        "[cooperate]\nmethod = 'bridge'\nmeta_objective = false\nrefresh_steps = 5",
        [f"refresh_steps: read 5 {NO_SHADOW} 0"],
    ),
    "a shadow of nothing is offloaded": (
        "[cooperate]\nmethod = 'bridge'\nmeta_objective = false\nshadow_offload = 'parameters'",
        [f"shadow_offload: read 'parameters' {NO_SHADOW} 'none'"],
    ),
    "no rank": (
        "[cooperate]\nmethod = 'bridge'\nlora = {rank = 0}",
        ["cooperate.lora.rank:", "read 0"],
    ),
    "groups without shares": (
        "[cooperate]\nmethod = 'trapo'\nprefix_groups = [4, 4]",
        ["prefix_returns: read 2, 4 and 4 entries; expected equally many"],
    ),
    "no groups": (
        "[cooperate]\nmethod = 'trapo'\nprefix_groups = []\nprefix_fracs = []\nprefix_returns = []",
        ["read 0, 0 and 0 entries; expected equally many, at least one"],
    ),
    "a group of nobody": (
        "[cooperate]\nmethod = 'trapo'\nprefix_groups = [4, 2, 2, 0]",
        ["cooperate.prefix_groups.3:", "greater than 0; read 0"],
    ),
    "more than a whole trace": (
        "[cooperate]\nmethod = 'trapo'\nprefix_fracs = [0, 0.2, 0.5, 1.2]",
        ["cooperate.prefix_fracs.3:", "less than or equal to 1; read 1.2"],
    ),
    "other groups than RL's": (
        "[cooperate]\nmethod = 'trapo'\n[rl]\ngroup_size = 4",
        ["cooperate.prefix_groups: read [4, 2, 1, 1], together 8; expected rl.group_size, 4"],
    ),
    "guided where answers must be its own": (
        "[cooperate]\nmethod = 'trapo'\n[rl]\nloss = 'nft'",
        ['cooperate.method: read "trapo" with rl.loss "nft"', "expected another loss"],
    ),
    **{
        f"{of} partitioned by nobody": (
            f"[cooperate]\n{lines}\n[learner]\nzero_stage = 2",
            [f"learner.zero_stage: read 2 with cooperate.method '{of}'", "expected 3"],
        )
        for of, lines in (
            ("bridge", "method = 'bridge'"),
            ("alternate", "method = 'alternate'\nfrozen_frac = 0.1"),
        )
    },
    "adapters twice": (
        "[cooperate]\nmethod = 'bridge'\n[learner]\nlora = {}",
        ['learner.lora: read one with cooperate.method "bridge"', "expected none"],
    ),
    "a shadow of fewer ranks": (
        "[cooperate]\nmethod = 'bridge'\n[learner]\nnum_workers = 4\nmin_workers = 2",
        ["learner.min_workers: read 2", "expected learner.num_workers, 4"],
    ),
    "distilled": (
        "[cooperate]\nsft = {objective = 'kl'}",
        ['cooperate.sft.objective: read "kl"', "expected another objective"],
    ),
    "weights over both signals": (
        "[cooperate]\nsft = {normalize = 'per_batch'}",
        ["cooperate.sft: read normalize 'per_batch' and control 'none'", "expected others"],
    ),
    "a mean over both signals": (
        "[cooperate]\n[sft]\ncontrol = 'mean_weight'",
        ["cooperate.sft: read normalize 'none' and control 'mean_weight'", "expected others"],
    ),
    "wrong traces as guides": (
        "[cooperate]\nmethod = 'trapo'\n[sft]\nnegatives = true",
        ["cooperate.sft.negatives: read true", "must be right, expected false"],
    ),
    "wrong traces for what has failed": (
        "[cooperate]\ntraces = 'failed'\nsft = {negatives = true}",
        ["cooperate.sft.negatives: read true", "must be right, expected false"],
    ),
    **{
        f"{key} of its own": (
            f"[cooperate]\nsft = {{{key} = {value}}}",
            [f"sft.{key}: read", "steps and optimizer are those of [rl], expected none"],
        )
        for key, value in (("learning_rate", "1e-3"), ("epochs", "2"), ("schedule", "'linear'"))
    },
    "an unknown key for traces": (
        "[cooperate]\nsft = {levle = 'none'}",
        ["cooperate.sft: levle: unknown key", "read 'none'"],
    ),
    "a wrong value for traces": (
        "[cooperate]\nsft = {level = 'none', control = 'centered'}",
        ["cooperate.sft:", "control: read 'centered' with level \"none\""],
    ),
    "traces as a word": ("[cooperate]\nsft = 'plain'", ["cooperate.sft:", "read 'plain'"]),
    "an arm's unknown method": (
        "[[arms]]\nname = 'a'\ncooperate = {method = 'mix'}",
        ["arms.a.cooperate: method:", "read 'mix'"],
    ),
    "an arm's unknown key": (
        "[[arms]]\nname = 'a'\ncooperate = {methd = 'sum'}",
        ["arms.a.cooperate: methd: unknown key", "read 'sum'"],
    ),
    "an arm that may or may not": (
        "[[arms]]\nname = 'a'\ncooperate = true",
        ["arms.0.cooperate:", "read True"],
    ),
    "an arm's misfit with its own RL": (
        "[[arms]]\nname = 'a'\ncooperate = {method = 'trapo'}\nrl = {group_size = 16}",
        ["arms.a:", "cooperate.prefix_groups: read", "expected rl.group_size, 16"],
    ),
    "an arm's misfit with its own SFT": (
        "[[arms]]\nname = 'a'\ncooperate = {traces = 'failed'}\nsft = {negatives = true}",
        ["arms.a:", "cooperate.sft.negatives: read true"],
    ),
    "an arm's method without the job's keys": (
        "[cooperate]\nmethod = 'bridge'\nrefresh_steps = 9\n"
        "[[arms]]\nname = 'a'\ncooperate = {method = 'sum'}",
        ["arms.a.cooperate:", "refresh_steps: read 9 with method 'sum'; only 'bridge' has it"],
    ),
}


@pytest.mark.parametrize(("lines", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused_by_name(dry_run, lines, said):
    code, printed, complained = dry_run(lines)
    assert code == 2 and not printed
    assert complained.startswith("pear-ray: job.toml: ") and len(complained.splitlines()) == 1
    for part in said:
        assert part in complained, complained
    assert not Path("run").exists()


def test_the_stage_alone_needs_its_section(dry_run):
    code, printed, complained = dry_run("[[arms]]\nname = 'a'\ncooperate = {}")
    assert code == 2 and not printed
    assert complained == (
        "pear-ray: cooperate: missing; expected a section [cooperate] with a method\n"
    )


def test_a_mistake_in_an_override_is_refused(dry_run):
    code, _, complained = dry_run("[cooperate]", "--cooperate.frozen-frac", "0.5")
    assert code == 2
    told = " ".join(complained.replace("│", " ").split())
    assert "frozen_frac: read 0.5 with method 'sum'; only 'alternate' has it" in told


# What the job says, and what of it is not as it is without it.
GOOD = {
    "nothing more": ("", {}),
    "another share at the end": (
        "rl_weight = 0.2\nrl_weight_final = 1",
        {"rl_weight": 0.2, "rl_weight_final": 1.0},
    ),
    "MIFO": (
        "method = 'alternate'\ntraces = 'failed'\nfailed_pass_rate = 0.25\nentropy_top_frac = 0.2\n"
        "frozen_frac = 0.5",
        {
            "method": "alternate",
            "traces": "failed",
            "failed_pass_rate": 0.25,
            "entropy_top_frac": 0.2,
            "frozen_frac": 0.5,
        },
    ),
    "BRIDGE": (
        "method = 'bridge'\nrefresh_steps = 20\nshadow_offload = 'optimizer'\nlora = {rank = 4}",
        {"method": "bridge", "refresh_steps": 20, "shadow_offload": "optimizer"},
    ),
    "BRIDGE without its objective": (
        "method = 'bridge'\nmeta_objective = false",
        {"method": "bridge", "meta_objective": False},
    ),
    "TRAPO": (
        "method = 'trapo'\nprefix_groups = [6, 2]\nprefix_fracs = [0, 0.5]\n"
        "prefix_returns = [-1, 0.5]",
        {
            "method": "trapo",
            "prefix_groups": (6, 2),
            "prefix_fracs": (0.0, 0.5),
            "prefix_returns": (-1.0, 0.5),
        },
    ),
    "traces of its own": (
        "sft = {level = 'sequence', normalize = 'per_sequence', examples_per_step = 8}",
        {"sft": {"level": "sequence", "normalize": "per_sequence", "examples_per_step": 8}},
    ),
}


@pytest.mark.parametrize(("lines", "changed"), GOOD.values(), ids=GOOD)
def test_what_fits_together_is_taken_and_reads_back(dry_run, lines, changed):
    code, printed, complained = dry_run(f"[cooperate]\n{lines}")
    assert code == 0, complained
    job = Job.model_validate_json(printed)
    assert job == read_job(Path("job.toml"))
    assert job.cooperate.model_dump() == job.cooperate.model_dump() | changed
    assert job.last_stage_of("") == "cooperate"


@pytest.mark.parametrize(
    ("lines", "objective"),
    [
        ("[cooperate]", "dft"),
        ("[cooperate]\nmethod = 'trapo'", "trsft"),
        ("[cooperate]\nmethod = 'trapo'\nsft = {objective = 'nll'}", "nll"),
    ],
    ids=str,
)
def test_traces_are_learned_as_the_method_the_section_or_sft_says(lines, objective):
    Path("job.toml").write_text(f"{JOB}[sft]\nobjective = 'dft'\nepochs = 3\n{lines}")
    job = read_job(Path("job.toml"))
    own = job.cooperate.sft_of(job.sft)
    assert (own.objective, own.epochs, own.level) == (objective, 3, "token")


def test_arms_end_with_either_stage(dry_run):
    lines = """
    [cooperate]
    rl_weight = 0.7
    [[arms]]
    name = "after"
    [[arms]]
    name = "both"
    cooperate = {}
    [[arms]]
    name = "bridge"
    sft = false
    cooperate = {method = "bridge"}
    rl = {steps = 3}
    """
    code, printed, complained = dry_run(lines)
    assert code == 0, complained
    job = Job.model_validate_json(printed)
    assert [arm.stages for arm in job.arms] == [
        ("sft", "rl"), ("sft", "cooperate"), ("cooperate",),
    ]  # fmt: skip
    after, both, bridge = (job.of_arm(arm) for arm in job.arms)
    assert after.cooperate is None and after.last_stage_of("") == "rl"
    assert both.cooperate == job.cooperate
    assert (bridge.cooperate.method, bridge.cooperate.rl_weight) == ("bridge", 0.7)
    assert bridge.rl.steps == 3
    assert [job.last_stage_of(home) for home in ("after", "both@3", "bridge@3")] == [
        "rl", "cooperate", "cooperate",
    ]  # fmt: skip


def test_labels_say_what_came_before():
    labels = ["base", "a/sft", "a/cooperate", "b@1/cooperate", "cooperate", "sft", "mine"]
    assert [is_after_rl(label) for label in labels] == [
        False, False, True, True, True, False, False,
    ]  # fmt: skip
    assert [start_of(label, labels) for label in labels] == [
        None, "base", "a/sft", "base", "sft", "base", None,
    ]  # fmt: skip
    assert set(Arm(name="a", cooperate={}).stages) <= set(TRAINING_STAGES)
