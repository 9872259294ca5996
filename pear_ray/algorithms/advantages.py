"""From the rewards of one problem's group of answers to their advantages."""

from __future__ import annotations

from torch import Tensor


def group_advantages(rewards_G: Tensor, kind: str) -> Tensor:
    """How much better each answer is than its group.

    grpo     (r - mean) / std, with the sample standard deviation (DeepSeekMath, arXiv 2402.03300)
    dr_grpo  r - mean (arXiv 2503.20783: without the division no group counts more for being
             easy or hard)
    rloo     r minus the mean of the OTHER answers (arXiv 2402.14740)

    Args:
        rewards_G: float [group size], at least 2.
        kind: one of the three names.

    Returns:
        Tensor [group size]; all zero where all rewards are equal.

    Raises:
        ValueError: unknown kind, or a group of fewer than two.
    """
    if kind not in KINDS:
        raise ValueError(f"advantage: read {kind!r}; expected one of {sorted(KINDS)}")
    if rewards_G.ndim != 1 or rewards_G.numel() < 2:
        raise ValueError(
            f"expected at least 2 rewards in one dimension, read {tuple(rewards_G.shape)}"
        )
    # Measured from the first reward, equal rewards are exactly 0; their mean may be a rounding off.
    shifted_G = rewards_G - rewards_G[0]
    return KINDS[kind](shifted_G - shifted_G.mean())


# Keeps groups without spread at zero instead of dividing rounding noise by nothing.
MIN_STD = 1e-6


def _grpo(centred_G: Tensor) -> Tensor:
    variance = centred_G.square().sum() / (centred_G.numel() - 1)
    return centred_G / (variance.sqrt() + MIN_STD)


def _dr_grpo(centred_G: Tensor) -> Tensor:
    return centred_G


def _rloo(centred_G: Tensor) -> Tensor:
    return centred_G * (centred_G.numel() / (centred_G.numel() - 1))


KINDS = {"grpo": _grpo, "dr_grpo": _dr_grpo, "rloo": _rloo}
