"""Parameter drift: values against numpy, and the drift of the arms of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pear_ray.config import Arm, Job, Model
from pear_ray.rank.drift import Drift, parameter_drift, stable_rank

SHAPES = [(7, 5), (3,), (20, 4)]


def test_total_equals_numpy_on_all_tensors_as_one_vector():
    rng = torch.Generator().manual_seed(0)
    models = [[torch.randn(shape, generator=rng) for shape in SHAPES] for _ in range(3)]
    tensors = zip(*models, strict=True)
    row = Drift.total(Drift.of(a, b - a, c - b) for a, b, c in tensors).row(has_rl=True)
    a, b, c = (np.concatenate([t.double().numpy().ravel() for t in model]) for model in models)
    norm = np.linalg.norm
    cosine = (b - a) @ (c - b) / norm(b - a) / norm(c - b)
    assert row == pytest.approx({"sft_move": norm(b - a) / norm(a), "rl_move": norm(c - b) / norm(b), "cosine": cosine})


@pytest.mark.parametrize(("factor", "cosine"), [(0.5, 1.0), (-0.25, -1.0)])
def test_cosine_of_continuing_and_of_undoing(factor, cosine):
    step = torch.arange(16.0).reshape(4, 4)
    drift = Drift.of(torch.ones(4, 4), step, factor * step)
    assert drift.row(has_rl=True)["cosine"] == pytest.approx(cosine)
    assert drift.rl == pytest.approx(factor**2 * drift.sft)


def test_zero_steps_and_zero_tensors_have_no_ratio():
    ones, zeros = torch.ones(3, 3), torch.zeros(3, 3)
    row = Drift.of(ones, zeros, ones).row(has_rl=True)
    assert row["cosine"] is None and row["sft_move"] == 0.0
    assert stable_rank(zeros) is None
    assert Drift.of(zeros, ones, ones).row(has_rl=True)["sft_move"] is None


def test_small_steps_of_bfloat16_weights_are_not_rounded_away():
    before = torch.full((64,), 1.0, dtype=torch.bfloat16)
    after = before.clone()
    after[0] += 2**-7
    step = after.float() - before.float()
    assert Drift.of(before.float(), step, step).sft == 2.0**-14


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (200, 3), (1, 9), (2, 2)])
def test_stable_rank_equals_the_full_svd(shape):
    step = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = np.linalg.svd(step.double().numpy(), compute_uv=False)
    expected = (values**2).sum() / values[0] ** 2
    assert stable_rank(step) == pytest.approx(expected, rel=1e-3)
    assert stable_rank(step) == stable_rank(step)


def test_stable_rank_of_known_matrices():
    assert stable_rank(torch.outer(torch.arange(1.0, 6), torch.ones(9))) == pytest.approx(1)
    assert stable_rank(3 * torch.eye(6)) == pytest.approx(6)


def test_stable_rank_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    stable_rank(torch.ones(4, 4))
    assert torch.equal(torch.rand(3), expected)


def write_weights(folder: Path, **tensors: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, folder / f"model-{number}.safetensors")


def test_drift_of_every_arm(tmp_path: Path) -> None:
    """SFT adds ones to a matrix, RL takes half of that back; a head that one model lacks is skipped. Arms without RL or
    without SFT lack that step."""
    ones, norm = torch.ones(4, 6), torch.ones(6)
    write_weights(tmp_path / "base", matrix=2 * ones, norm=norm, head=ones)
    for export, factor in {
        "whole/sft": 3, "half/sft": 3, "whole/rl": 2.5, "none/rl": 2.5,
        "both/sft": 3, "both/cooperate": 3.5,
    }.items():  # fmt: skip
        write_weights(tmp_path / "arms" / export / "export", matrix=factor * ones, norm=norm)
    job = Job.model_validate(
        {
            "run": {"dir": str(tmp_path)},
            "model": {"path": "some/model"},
            "tasks": [{"name": "countdown"}],
            "generator": {"max_new_tokens": 48, "max_model_len": 64},
        }
    ).model_copy(
        update={
            "model": Model(path=str(tmp_path / "base"), dtype="float32"),
            "arms": (*(Arm(name=name) for name in ("whole", "half", "none", "other")), Arm(name="both", cooperate={})),
        }
    )
    rows = parameter_drift(job)
    assert rows.keys() == {"whole", "half", "none", "both"}
    whole, half, none, both = (rows[name] for name in ("whole", "half", "none", "both"))
    assert whole["sft_move"] == pytest.approx((24 / (4 * 24 + 6)) ** 0.5)
    assert whole["rl_move"] == pytest.approx((6 / (9 * 24 + 6)) ** 0.5)
    assert whole["cosine"] == pytest.approx(-1)
    assert whole["matrices"]["matrix"]["sft_move"] == pytest.approx(0.5)
    assert whole["matrices"]["matrix"]["rl_stable_rank"] == pytest.approx(1)
    assert whole["matrices"].keys() == {"matrix"}
    assert half["sft_move"] == whole["sft_move"]
    assert half["rl_move"] is half["cosine"] is half["rl_stable_rank_median"] is None
    assert none["sft_move"] == 0 and none["cosine"] is none["sft_stable_rank_median"] is None
    assert none["rl_move"] == pytest.approx((6 / (4 * 24 + 6)) ** 0.5)
    assert both["rl_move"] == whole["rl_move"] and both["cosine"] == pytest.approx(1)
