"""The loss that stage `sft` builds from the job; its log lines and warnings."""

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
from pear_ray.losses import LossInputs
from pear_ray.losses.pear import Centered, MeanWeightOnly, NoNormalization, Pear, PerBatch, PerSequence, Shuffled
from pear_ray.losses.sft import Dft, IwSft, Kl, Nll, Supervised, TokenLoss, TrSft, Weighted
from pear_ray.sft.loss import HeldOut, build_sft_loss, log_step, weight_warning
from pear_ray.statistics import overtraining, weight_summary

SEED = 7
GROUPS = [
    RowGroup("0.parquet", 0, 3, 0, ("teacher_cipher", "teacher_plain")),
    RowGroup("0.parquet", 1, 3, 1, ("teacher_plain", "web")),
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


def loss_of(job: Job) -> Supervised:
    """Build the loss without a learner, which only SED-SFT needs."""
    return build_sft_loss(job, GROUPS, None)  # type: ignore[arg-type]


LOSSES: dict[str, tuple[dict[str, Any], TokenLoss]] = {
    "nll": ({}, Nll()),
    "dft": ({"objective": "dft"}, Dft()),
    "trsft": ({"objective": {"type": "trsft", "alpha": 0.25}}, TrSft(0.25)),
    "iw": ({"objective": {"type": "iw", "temperature": 2.0, "bounds": (0.5, 4.0)}}, IwSft(2.0, (0.5, 4.0))),
}


@pytest.mark.parametrize(("settings", "loss"), LOSSES.values(), ids=LOSSES)
def test_each_base_objective_with_and_without_weights(settings: dict[str, Any], loss: TokenLoss) -> None:
    assert loss_of(job_of(level="none", **settings)) == Supervised(loss)
    weighted = loss_of(job_of(**settings))
    assert isinstance(weighted, Weighted) and weighted.loss == loss
    assert weighted.weigh == Pear("token")


def test_distillation_knows_the_vocabulary_of_the_model(tiny_model: Any) -> None:
    """All 128 rows of its embeddings, not the 100 words of its tokenizer."""
    job = job_of(str(tiny_model(True)), objective="kl", level="none")
    assert loss_of(job) == Supervised(Kl(128))


CHOSEN = {
    "level": "block",
    "discount": 0.9,
    "block_size": 3,
    "clip_log_ratio": (-1.0, 2.0),
    "clip_log_weight": (-4.0, 3.0),
}
OWN = Pear("block", 0.9, 3, (-1.0, 2.0), (-4.0, 3.0))
# (keys of [sft], the weights, their normalization)
WEIGHTS: dict[str, tuple[dict[str, Any], Any, type[NoNormalization]]] = {
    "the paper's": ({}, Pear("token"), NoNormalization),
    "sequence": ({"level": "sequence"}, Pear("sequence"), NoNormalization),
    "short answers": ({"preset": "short_answers"}, Pear("token", clip_log_ratio=(-0.5, 0.5)), NoNormalization),
    "all chosen": (CHOSEN, OWN, NoNormalization),
    "per sequence": ({**CHOSEN, "normalize": "per_sequence"}, OWN, PerSequence),
    "per batch": ({**CHOSEN, "normalize": "per_batch"}, OWN, PerBatch),
    "mean weight": ({**CHOSEN, "control": "mean_weight"}, OWN, MeanWeightOnly),
    "shuffled": ({**CHOSEN, "control": "shuffled"}, Shuffled(*astuple(OWN), seed=SEED), NoNormalization),
    "centered": ({**CHOSEN, "control": "centered"}, Centered(*astuple(OWN)), NoNormalization),
}


@pytest.mark.parametrize(("settings", "weigh", "normalization"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_follow_the_job(settings: dict[str, Any], weigh: Any, normalization: type[NoNormalization]) -> None:
    job = job_of(**settings)
    loss = loss_of(job)
    assert isinstance(loss, Weighted) and loss.loss == Nll()
    assert loss.weigh == weigh
    assert type(loss.normalization) is normalization
    # Diagnostics use the same bounds as the weights.
    assert loss.weigh.clip_log_ratio == job.sft.ratio_bounds
    assert loss.weigh.clip_log_weight == job.sft.clip_log_weight
    assert loss.sources == ("teacher_cipher", "teacher_plain", "web")


HEALTHY: dict[str, Any] = {
    "effective_sample_size": 0.6,
    "weight_frac_at_floor": 0.1,
    # A source that is clipped, beside one that is not, is what PEAR is for.
    "clip_frac_low_by_source": {"teacher_plain": 0.2, "teacher_cipher": 0.9},
}
# (metrics that change, parts of the warning)
WARNINGS = {
    "floor": ({"weight_frac_at_floor": 0.75}, ("75%", "smallest possible weight", "sft.level")),
    "few tokens": ({"effective_sample_size": 0.125}, ("12%", "effective sample size", "sft.clip_log_weight")),
    "lower clip": (
        {"clip_frac_low_by_source": {"teacher_plain": 0.625, "teacher_cipher": 0.9}},
        ("62%", "at the lower clip", "sft.clip_log_ratio"),
    ),
}


def test_healthy_weights_and_plain_sft_have_no_warning() -> None:
    assert weight_warning(HEALTHY) is None
    bounds = {"effective_sample_size": 0.2, "weight_frac_at_floor": 0.5, "clip_frac_low_by_source": {"a": 0.5}}
    assert weight_warning(HEALTHY | bounds) is None
    assert weight_warning({"loss": 0.5, "nll": 0.5}) is None


@pytest.mark.parametrize(("changes", "parts"), WARNINGS.values(), ids=WARNINGS)
def test_a_warning_names_the_metric_and_a_remedy(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    warning = weight_warning(HEALTHY | changes)
    assert warning is not None
    for part in parts:
        assert part in warning


def test_the_most_severe_warning_wins() -> None:
    combined = dict(HEALTHY)
    for name in ("lower clip", "few tokens", "floor"):
        changes, (_, subject, _) = WARNINGS[name]
        combined |= changes
        assert subject in str(weight_warning(combined))


share = st.floats(0, 1)


@given(sample_size=share, at_floor=share, clipped_low=share)
def test_there_is_a_warning_exactly_beyond_a_bound(sample_size: float, at_floor: float, clipped_low: float) -> None:
    metrics = {"effective_sample_size": sample_size, "weight_frac_at_floor": at_floor}
    metrics["clip_frac_low_by_source"] = {"a": clipped_low, "b": 1.0}
    is_healthy = sample_size >= 0.2 and at_floor <= 0.5 and clipped_low <= 0.5
    assert (weight_warning(metrics) is None) == is_healthy


def summary_of(job: Job, log_ratios: list[list[float]]) -> dict[str, Any]:
    """Summarize the weights of a micro-batch of traces with these log-ratios."""
    ratios = torch.tensor([ratio for trace in log_ratios for ratio in trace])
    lengths = [len(trace) for trace in log_ratios]
    tokens = LossInputs(
        logprobs=torch.full_like(ratios, -5.0, requires_grad=True),
        entropies=torch.ones_like(ratios),
        sampled_logprobs=-5.0 - ratios,
        coefficients=torch.ones_like(ratios),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        origins=("teacher_plain",) * len(lengths),
        num_tokens_global=len(ratios),
        num_sequences_global=len(lengths),
    )
    sums = {name: value.numpy() for name, value in loss_of(job)(tokens).metric_sums.items()}
    return weight_summary(sums, len(ratios), job.sft.clip_log_weight)


@pytest.mark.parametrize(
    ("settings", "log_ratios", "part"),
    [
        ({}, [[0.01, -0.02, 0.0] * 5] * 4, None),
        ({}, [[-3.0] * 600] * 2, "smallest possible weight"),
        ({"clip_log_ratio": (-4.0, 4.0)}, [[0.0, 4.0], *[[0.0, -4.0]] * 9], "effective sample"),
        ({}, [[-3.0] * 5] * 4, "at the lower clip"),
    ],
    ids=["healthy", "far from the model", "one trace carries the step", "all below the clip"],
)
def test_warnings_follow_from_the_sums_of_the_loss(
    settings: dict[str, Any], log_ratios: list[list[float]], part: str | None
) -> None:
    warning = weight_warning(summary_of(job_of(**settings), log_ratios))
    assert warning is None if part is None else part in str(warning)


@pytest.mark.parametrize("lowest", [0.5, 1.0, 1.7, 2.0])
def test_regimes_of_overtraining_begin_beyond_their_bounds(lowest: float) -> None:
    mild, severe = 1.02 * lowest, 1.10 * lowest
    losses = [lowest, mild, math.nextafter(mild, 9), severe, math.nextafter(severe, 9), 9 * lowest]
    regimes = ["stable"] * 2 + ["mild over-training"] * 2 + ["severe over-training"] * 2
    assert [overtraining(loss, lowest) for loss in losses] == regimes


def test_an_unmeasured_held_out_loss_has_no_metrics() -> None:
    heldout = HeldOut(())
    assert heldout.metrics == {}
    assert heldout.measure(None) is heldout  # type: ignore[arg-type]
    assert heldout.resume({}).metrics == {}


def test_held_out_losses_resume_from_a_checkpoint() -> None:
    before = HeldOut((), 2.5, 2.0)
    assert before.metrics == {"heldout_loss": 2.5, "lowest_heldout_loss": 2.0}
    assert HeldOut(()).resume({"next_step": 3, **before.metrics}) == before


STEP = {"loss": 0.25, **HEALTHY}


@pytest.mark.parametrize(
    ("step", "heldout", "expected"),
    [
        (0, HeldOut(()), ["step 1 of 25: loss 0.2500"]),
        (1, HeldOut((), 2.5, 2.0), []),
        (20, HeldOut((), 2.0, 2.0), ["step 21 of 25: loss 0.2500, held-out loss 2.0000 (stable)"]),
        (24, HeldOut((), 2.1, 2.0), ["step 25 of 25: loss 0.2500, held-out loss 2.1000 (mild over-training)"]),
    ],
)
def test_every_tenth_step_and_the_last_one_are_logged(
    step: int, heldout: HeldOut, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log_step(step, 25, STEP, heldout)
    assert caplog.messages == [f"sft: {line}" for line in expected]


def test_a_warning_is_logged_with_its_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics = STEP | WARNINGS["floor"][0]
    log_step(10, 25, metrics, HeldOut(()))
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == f"sft: step 11: {weight_warning(metrics)}"
