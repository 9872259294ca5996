"""What stage `sft` makes of the job's words, and what it says of a step."""

from __future__ import annotations

import logging
import math
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pear_ray.config import Job
from pear_ray.data.scored_dataset import RowGroup
from pear_ray.losses.inputs import LossInputs
from pear_ray.losses.sft import Supervised, Weighted
from pear_ray.losses.token_losses import Dft, IwSft, Kl, Nll, TokenLoss, TrSft
from pear_ray.losses.weighting import (
    Centered,
    MeanWeightOnly,
    NoNormalization,
    Pear,
    PerBatch,
    PerSequence,
    Shuffled,
)
from pear_ray.sft.build import objective_of
from pear_ray.sft.heldout import HeldOut
from pear_ray.sft.metrics import advice_on, speak
from pear_ray.statistics import overtraining, weight_summary

SEED = 7
GROUPS = [
    RowGroup("0.parquet", 0, 3, 0, ("coder", "tutor")),
    RowGroup("0.parquet", 1, 3, 1, ("tutor", "web")),
]


def job_of(model: str = "./model", **sft: Any) -> Job:
    return Job.model_validate(
        {
            "run": {"dir": "run", "seed": SEED},
            "model": {"path": model},
            "generator": {"max_new_tokens": 8, "max_model_len": 64},
            "tasks": [{"name": "countdown"}],
            "corpus": {"top_logprobs": 2},
            "sft": sft,
        }
    )


def made_of(job: Job) -> Supervised:
    """Its objective. Only SED-SFT measures anything first."""
    return objective_of(job, GROUPS, None)  # type: ignore[arg-type]


LOSSES: dict[str, tuple[dict[str, Any], TokenLoss]] = {
    "nll": ({}, Nll()),
    "dft": ({"objective": "dft"}, Dft()),
    "trsft": ({"objective": "trsft", "trsft_alpha": 0.25}, TrSft(0.25)),
    "iw": (
        {"objective": "iw", "iw_temperature": 2.0, "iw_bounds": (0.5, 4.0)},
        IwSft(2.0, (0.5, 4.0)),
    ),
}


@pytest.mark.parametrize(("words", "loss"), LOSSES.values(), ids=LOSSES)
def test_each_base_objective_may_be_weighted_or_not(words: dict[str, Any], loss: TokenLoss) -> None:
    assert made_of(job_of(level="none", **words)) == Supervised(loss)
    weighted = made_of(job_of(**words))
    assert isinstance(weighted, Weighted) and weighted.loss == loss
    assert weighted.weigh == Pear("token")


def test_distillation_knows_the_vocabulary_of_the_model(tiny_model: Any) -> None:
    """All 128 rows of its embeddings, not the 100 words of its tokenizer."""
    job = job_of(str(tiny_model(True)), objective="kl", level="none")
    assert made_of(job) == Supervised(Kl(128))


CHOSEN = {
    "level": "block",
    "discount": 0.9,
    "block_size": 3,
    "clip_log_ratio": (-1.0, 2.0),
    "clip_log_weight": (-4.0, 3.0),
}
OWN = Pear("block", 0.9, 3, (-1.0, 2.0), (-4.0, 3.0))
# (what the job says, the weights, what is done with them)
WEIGHTS: dict[str, tuple[dict[str, Any], Any, type[NoNormalization]]] = {
    "the paper's": ({}, Pear("token"), NoNormalization),
    "sequence": ({"level": "sequence"}, Pear("sequence"), NoNormalization),
    "short answers": (
        {"preset": "short_answers"},
        Pear("token", clip_log_ratio=(-0.5, 0.5)),
        NoNormalization,
    ),
    "all chosen": (CHOSEN, OWN, NoNormalization),
    "per sequence": ({**CHOSEN, "normalize": "per_sequence"}, OWN, PerSequence),
    "per batch": ({**CHOSEN, "normalize": "per_batch"}, OWN, PerBatch),
    "mean weight": ({**CHOSEN, "control": "mean_weight"}, OWN, MeanWeightOnly),
    "shuffled": (
        {**CHOSEN, "control": "shuffled"},
        Shuffled(*astuple(OWN), seed=SEED),
        NoNormalization,
    ),
    "centered": ({**CHOSEN, "control": "centered"}, Centered(*astuple(OWN)), NoNormalization),
}


@pytest.mark.parametrize(("words", "weigh", "normalization"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_are_those_of_the_job(
    words: dict[str, Any], weigh: Any, normalization: type[NoNormalization]
) -> None:
    job = job_of(**words)
    found = made_of(job)
    assert isinstance(found, Weighted) and found.loss == Nll()
    assert found.weigh == weigh
    assert type(found.normalization) is normalization
    # Facts are told by the same bounds as weights are clipped by.
    assert found.weigh.clip_log_ratio == job.sft.ratio_bounds
    assert found.weigh.clip_log_weight == job.sft.clip_log_weight
    assert found.sources == ("coder", "tutor", "web")


HEALTHY = {
    "effective_sample_size": 0.6,
    "weight_frac_at_floor": 0.1,
    "clip_frac_low": 0.2,
    "clip_frac_high": 0.2,
}
ADVICE = {
    "floor": ({"weight_frac_at_floor": 0.75}, ["75% of the tokens have the smallest weight"]),
    "few tokens": (
        {"effective_sample_size": 0.125},
        ["effective sample size is 12% of the tokens", "sft.clip_log_weight"],
    ),
    "lower clip": (
        {"clip_frac_low": 0.625},
        ["62% of the log-ratios are at the lower clip", "a wider sft.clip_log_ratio"],
    ),
}


def test_there_is_no_advice_on_healthy_weights_or_on_none() -> None:
    assert advice_on(HEALTHY) is None
    borders = {"effective_sample_size": 0.2, "weight_frac_at_floor": 0.5}
    assert advice_on({**HEALTHY, **borders, "clip_frac_low": 0.5}) is None
    assert advice_on({"loss": 0.5, "nll": 0.5, "clip_frac_low": 1.0}) is None


@pytest.mark.parametrize(("changes", "said"), ADVICE.values(), ids=ADVICE)
def test_advice_names_the_number_and_what_to_try(
    changes: dict[str, float], said: list[str]
) -> None:
    advice = advice_on(HEALTHY | changes)
    assert advice is not None and "sft." in advice
    for part in said:
        assert part in advice


def test_of_several_troubles_the_worst_is_told() -> None:
    together: dict[str, float] = dict(HEALTHY)
    for name in ("lower clip", "few tokens", "floor"):
        changes, (said, *_) = ADVICE[name]
        together |= changes
        assert said in str(advice_on(together))


share = st.floats(0, 1)


@given(effective=share, floor=share, lower=share)
def test_there_is_advice_exactly_beyond_a_border(
    effective: float, floor: float, lower: float
) -> None:
    numbers = {
        "effective_sample_size": effective,
        "weight_frac_at_floor": floor,
        "clip_frac_low": lower,
    }
    healthy = effective >= 0.2 and floor <= 0.5 and lower <= 0.5
    assert (advice_on(numbers) is None) == healthy


def summary_of(job: Job, log_ratios: list[list[float]]) -> dict[str, Any]:
    """What one micro-batch of traces with these log-ratios would say of its weights."""
    ratios = torch.tensor([ratio for trace in log_ratios for ratio in trace])
    lengths = [len(trace) for trace in log_ratios]
    tokens = LossInputs(
        logprobs=torch.full_like(ratios, -5.0, requires_grad=True),
        entropies=torch.ones_like(ratios),
        sampled_logprobs=-5.0 - ratios,
        coefficients=torch.ones_like(ratios),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        origins=("tutor",) * len(lengths),
        num_tokens_global=len(ratios),
        num_sequences_global=len(lengths),
    )
    facts = {name: fact.numpy() for name, fact in made_of(job)(tokens).facts.items()}
    return weight_summary(facts, len(ratios), job.sft.clip_log_weight)


@pytest.mark.parametrize(
    ("words", "log_ratios", "said"),
    [
        ({}, [[0.01, -0.02, 0.0] * 5] * 4, None),
        ({}, [[-3.0] * 600] * 2, "smallest weight"),
        ({"clip_log_ratio": (-4.0, 4.0)}, [[0.0, 4.0], *[[0.0, -4.0]] * 9], "effective sample"),
        ({}, [[-3.0] * 5] * 4, "at the lower clip"),
    ],
    ids=["healthy", "far from the model", "one trace carries the step", "all below the clip"],
)
def test_advice_reads_what_the_objective_says(
    words: dict[str, Any], log_ratios: list[list[float]], said: str | None
) -> None:
    advice = advice_on(summary_of(job_of(**words), log_ratios))
    assert advice is None if said is None else said in str(advice)


@pytest.mark.parametrize("lowest", [0.5, 1.0, 1.7, 2.0])
def test_regimes_of_overtraining_begin_beyond_their_borders(lowest: float) -> None:
    mild, severe = 1.02 * lowest, 1.10 * lowest
    losses = [lowest, mild, math.nextafter(mild, 9), severe, math.nextafter(severe, 9), 9 * lowest]
    found = ["stable"] * 2 + ["mild over-training"] * 2 + ["severe over-training"] * 2
    assert [overtraining(loss, lowest) for loss in losses] == found
    assert [HeldOut((), loss, lowest).regime for loss in losses] == found


def test_nothing_is_said_of_held_out_rows_that_were_not_measured() -> None:
    heldout = HeldOut(())
    assert heldout.numbers == {}
    assert heldout.measured(None) is heldout  # type: ignore[arg-type]
    assert heldout.after({}).numbers == {}


def test_held_out_losses_go_on_where_a_checkpoint_was_written() -> None:
    before = HeldOut((), 2.5, 2.0)
    assert before.numbers == {"heldout_loss": 2.5, "lowest_heldout_loss": 2.0}
    assert HeldOut(()).after({"next_step": 3, **before.numbers}) == before


STEP = {"loss": 0.25, **HEALTHY}


@pytest.mark.parametrize(
    ("step", "heldout", "expected"),
    [
        (0, HeldOut(()), ["step 1 of 25: loss 0.2500"]),
        (1, HeldOut((), 2.5, 2.0), []),
        (20, HeldOut((), 2.0, 2.0), ["step 21 of 25: loss 0.2500, held-out loss 2.0000 (stable)"]),
        (
            24,
            HeldOut((), 2.1, 2.0),
            ["step 25 of 25: loss 0.2500, held-out loss 2.1000 (mild over-training)"],
        ),
    ],
)
def test_a_line_is_said_now_and_then_and_at_the_end(
    step: int, heldout: HeldOut, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    speak(step, 25, STEP, heldout)
    assert caplog.messages == [f"sft: {line}" for line in expected]


def test_advice_is_a_warning_with_its_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    numbers = STEP | ADVICE["floor"][0]
    speak(10, 25, numbers, HeldOut(()))
    (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert warning.getMessage() == f"sft: step 11: {advice_on(numbers)}"
