"""Predictors against enumeration of all groups and resamples, and on points with known correlations. Parameter drift
against numpy, and that of the arms of a run."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pear_ray.config import Arm, Job, Model
from pear_ray.rank import predictors

COUNTS = st.integers(2, 7).flatmap(
    lambda n: st.tuples(
        st.just(n), st.integers(1, n), st.lists(st.integers(0, n), min_size=1, max_size=4).map(np.array)
    )
)


def groups(num_samples, num_correct, group_size):
    """Return every group that can be drawn from the answers to one problem."""
    answers = [1] * num_correct + [0] * (num_samples - num_correct)
    return list(combinations(answers, group_size))


@given(COUNTS)
def test_share_without_signal_equals_enumeration(case):
    num_samples, group_size, counts = case
    shares = [
        Fraction(sum(len(set(g)) == 1 for g in drawn), len(drawn))
        for drawn in (groups(num_samples, int(c), group_size) for c in counts)
    ]
    if group_size == 1:
        return  # Neither the formula nor the question makes sense.
    measured = predictors.share_without_signal(num_samples, counts, group_size)
    assert measured == pytest.approx(float(sum(shares) / len(shares)), abs=1e-12)


@given(COUNTS)
def test_group_signal_is_the_mean_variance_within_groups(case):
    num_samples, group_size, counts = case

    def variance(group):
        mean = Fraction(sum(group), len(group))
        return sum((one - mean) ** 2 for one in group) / len(group)

    means = []
    for count in counts:
        drawn = groups(num_samples, int(count), group_size)
        means.append(sum(map(variance, drawn)) / len(drawn))
    measured = predictors.group_signal(num_samples, counts, group_size)
    assert measured == pytest.approx(float(sum(means) / len(means)), abs=1e-12)


def test_group_signal_equals_the_papers_formula():
    """p (1 - p) (g - 1) / g, with enough samples for p to be certain."""
    measured = predictors.group_signal(10**4, np.array([830]), 8)
    assert measured == pytest.approx(0.083 * 0.917 * 7 / 8, rel=1e-3)


@pytest.mark.parametrize("group_size, threshold", [(4, 0.159), (8, 0.083), (16, 0.042)])
def test_half_of_the_groups_have_no_signal_at_the_papers_threshold(group_size, threshold):
    counts = np.array([round(threshold * 1_000)])
    measured = predictors.share_without_signal(1_000, counts, group_size)
    assert measured == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("num_samples, group_size", [(1, 2), (4, 5)])
def test_a_group_larger_than_the_samples_is_refused(num_samples, group_size):
    with pytest.raises(ValueError, match="expected"):
        predictors.share_without_signal(num_samples, np.array([0]), group_size)


def test_group_signal_of_one_sample_is_refused():
    with pytest.raises(ValueError, match="expected at least 2"):
        predictors.group_signal(1, np.array([0]), 8)


def test_spearman_without_ties_equals_the_textbook_formula():
    """1 - 6 sum d^2 / (n (n^2 - 1)), unchanged by monotonic maps."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=12), draw.normal(size=12)
    orders = [[sorted(v).index(one) for one in v] for v in (x.tolist(), y.tolist())]
    distance = sum((a - b) ** 2 for a, b in zip(*orders, strict=True))
    expected = 1 - 6 * distance / (12 * 143)
    assert predictors.spearman(x, y) == pytest.approx(expected)
    assert predictors.spearman(np.exp(x), y**3) == pytest.approx(expected)
    assert predictors.spearman(x, -np.exp(x)) == pytest.approx(-1)


def test_constants_have_no_correlation():
    flat, steps = np.full(5, 0.3), np.arange(5.0)
    for one, other in ((flat, steps), (steps, flat), (flat, flat)):
        assert predictors.spearman(one, other) is None
        assert predictors.score_predictor([one], other, 0)["r_squared"] is None
    assert predictors.fit_line(flat, steps) == (0.0, 2.0)
    assert predictors.heldout_r_squared([steps], flat, 0) is None


def test_too_few_points_have_no_held_out_r_squared():
    steps = np.arange(3.0)
    assert predictors.heldout_r_squared([steps], steps, 0) is None


def test_points_on_a_line_are_predicted_exactly():
    x = np.arange(8.0)
    scores = predictors.heldout_r_squared([x], 3 * x - 1, 0)
    assert scores == {"mean": pytest.approx(1.0), "sd": pytest.approx(0.0, abs=1e-9)}
    assert predictors.fit_line(x, 3 * x - 1) == (pytest.approx(3.0), pytest.approx(-1.0))


def test_held_out_r_squared_equals_lines_fitted_by_numpy():
    """Two columns: the mean of their lines, over the same half splits."""
    draw = np.random.default_rng(1)
    y = draw.normal(size=9)
    columns = [y + draw.normal(size=9), -y + draw.normal(size=9)]
    order, expected = np.random.default_rng(5), []
    for _ in range(200):
        split = order.permutation(9)
        train, test = split[:4], split[4:]
        lines = [np.polyfit(x[train], y[train], 1) for x in columns]
        guesses = [np.polyval(fit, x[test]) for fit, x in zip(lines, columns, strict=True)]
        wrong = ((y[test] - np.mean(guesses, axis=0)) ** 2).sum()
        expected.append(1 - wrong / ((y[test] - y[test].mean()) ** 2).sum())
    measured = predictors.heldout_r_squared(columns, y, 5)
    assert measured == {"mean": pytest.approx(np.mean(expected)), "sd": pytest.approx(np.std(expected))}


# Rows of arXiv 2510.01624: Spearman and R^2 of pass@1, held-out loss and pass@64 with the result after RL.
PAPER = {
    "dataset, Llama3-8B": ((0.75, 0.94, 0.95), (0.57, 0.88, 0.87)),
    "dataset, Mistral-NeMo-12B": ((0.78, 0.90, 0.92), (0.29, 0.79, 0.57)),
    "instance, Llama3-8B": ((0.69, None, 0.94), (0.58, None, 0.92)),
    "instance, Mistral-NeMo-12B": ((0.70, None, 0.98), (0.73, None, 0.98)),
}


@pytest.mark.parametrize("spearmans, r_squareds", PAPER.values(), ids=PAPER)
def test_correlations_of_the_paper_are_recovered(spearmans, r_squareds):
    """Gaussian points with Pearson 2 sin(pi s / 6) have Spearman s; with Pearson r, R^2 = r^2."""
    num_points, draw = 20_000, np.random.default_rng(0)
    after = draw.normal(size=num_points)

    def with_pearson(target):
        return target * after + (1 - target**2) ** 0.5 * draw.normal(size=num_points)

    for target in filter(None, spearmans):
        x = with_pearson(2 * np.sin(np.pi * target / 6))
        assert predictors.spearman(x, after) == pytest.approx(target, abs=0.01)
    for target in filter(None, r_squareds):
        x = with_pearson(target**0.5)
        scores = predictors.score_predictor([x], after, 0)
        assert scores["r_squared"] == pytest.approx(target, abs=0.015)
        assert scores["heldout_r_squared"]["mean"] == pytest.approx(target, abs=0.015)


def test_held_out_r_squared_of_few_points_scatters():
    """With a dozen points R^2 of half splits has a standard deviation of tenths."""
    draw = np.random.default_rng(3)
    after = draw.normal(size=12)
    x = after + 0.8 * draw.normal(size=12)
    assert predictors.heldout_r_squared([x], after, 0)["sd"] > 0.1


def test_probability_of_first_equals_enumeration():
    """All 27 resamples of three problems; ties are shared."""
    values = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    expected = np.zeros(3)
    for drawn in product(range(3), repeat=3):
        means = values[:, list(drawn)].mean(axis=1)
        best = np.isclose(means, means.max())
        expected += best / best.sum() / 27
    measured = predictors.probabilities_of_first(values, 0, num_resamples=40_000)
    assert measured == pytest.approx(expected, abs=0.01)
    assert measured.sum() == pytest.approx(1.0)


def test_equal_candidates_share_first_place():
    values = np.random.default_rng(0).random((1, 50)).repeat(4, axis=0)
    assert predictors.probabilities_of_first(values, 0).tolist() == [0.25] * 4


SHAPES = [(7, 5), (3,), (20, 4)]


def test_total_equals_numpy_on_all_tensors_as_one_vector():
    rng = torch.Generator().manual_seed(0)
    models = [[torch.randn(shape, generator=rng) for shape in SHAPES] for _ in range(3)]
    tensors = zip(*models, strict=True)
    total = sum(predictors.step_moments(a, b - a, c - b) for a, b, c in tensors)
    row = predictors.relative_steps(total, has_rl=True)
    a, b, c = (np.concatenate([t.double().numpy().ravel() for t in model]) for model in models)
    norm = np.linalg.norm
    cosine = (b - a) @ (c - b) / norm(b - a) / norm(c - b)
    assert row == pytest.approx({"sft_move": norm(b - a) / norm(a), "rl_move": norm(c - b) / norm(b), "cosine": cosine})


@pytest.mark.parametrize(("factor", "cosine"), [(0.5, 1.0), (-0.25, -1.0)])
def test_cosine_of_continuing_and_of_undoing(factor, cosine):
    step = torch.arange(16.0).reshape(4, 4)
    moments = predictors.step_moments(torch.ones(4, 4), step, factor * step)
    assert predictors.relative_steps(moments, has_rl=True)["cosine"] == pytest.approx(cosine)
    assert moments[3] == pytest.approx(factor**2 * moments[1])


def test_zero_steps_and_zero_tensors_have_no_ratio():
    ones, zeros = torch.ones(3, 3), torch.zeros(3, 3)
    row = predictors.relative_steps(predictors.step_moments(ones, zeros, ones), has_rl=True)
    assert row["cosine"] is None and row["sft_move"] == 0.0
    assert predictors.stable_rank(zeros) is None
    row = predictors.relative_steps(predictors.step_moments(zeros, ones, ones), has_rl=True)
    assert row["sft_move"] is None


def test_small_steps_of_bfloat16_weights_are_not_rounded_away():
    before = torch.full((64,), 1.0, dtype=torch.bfloat16)
    after = before.clone()
    after[0] += 2**-7
    step = after.float() - before.float()
    assert predictors.step_moments(before.float(), step, step)[1] == 2.0**-14


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (200, 3), (1, 9), (2, 2)])
def test_stable_rank_equals_the_full_svd(shape):
    step = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = np.linalg.svd(step.double().numpy(), compute_uv=False)
    expected = (values**2).sum() / values[0] ** 2
    assert predictors.stable_rank(step) == pytest.approx(expected, rel=1e-3)
    assert predictors.stable_rank(step) == predictors.stable_rank(step)


def test_stable_rank_of_known_matrices():
    assert predictors.stable_rank(torch.outer(torch.arange(1.0, 6), torch.ones(9))) == pytest.approx(1)
    assert predictors.stable_rank(3 * torch.eye(6)) == pytest.approx(6)


def test_stable_rank_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    predictors.stable_rank(torch.ones(4, 4))
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
    rows = predictors.parameter_drift(job)
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
