"""Advantages from the rewards of one problem's group of completions."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards_G: Tensor, kind: str) -> Tensor:
    """Return the advantage of each completion over its group.

    grpo     (r - mean) / std, with the sample standard deviation (DeepSeekMath, arXiv 2402.03300)
    dr_grpo  r - mean (arXiv 2503.20783: without the division, groups do not count more for being
             easy or hard)
    rloo     r minus the mean of the OTHER completions (arXiv 2402.14740)
    nft      for `policy.Nft` only, which needs the group's pass rate and the sign: the mean if
             correct, minus the mean if wrong (arXiv 2505.18116)

    Args:
        rewards_G: float [group size], at least 2; for nft each 0 (wrong) or 1 (correct).
        kind: one of the four names.

    Returns:
        Tensor [group size]; all zero if all rewards are equal.

    Raises:
        ValueError: unknown kind, a group of fewer than two, or a non-binary reward for nft.
    """
    if kind not in KINDS:
        raise ValueError(f"advantage: expected one of {sorted(KINDS)}, got {kind!r}")
    if rewards_G.ndim != 1 or rewards_G.numel() < 2:
        raise ValueError(f"rewards_G: expected a 1-D tensor of at least 2, got shape {tuple(rewards_G.shape)}")
    return KINDS[kind](rewards_G)


# Keeps groups without spread at zero instead of dividing rounding noise by zero.
MIN_STD = 1e-6


def _grpo(rewards_G: Tensor) -> Tensor:
    centered_G = _centered(rewards_G)
    variance = centered_G.square().sum() / (centered_G.numel() - 1)
    return centered_G / (variance.sqrt() + MIN_STD)


def _centered(rewards_G: Tensor) -> Tensor:
    # Relative to the first reward, equal rewards are exactly 0; their mean may be off by rounding.
    shifted_G = rewards_G - rewards_G[0]
    return shifted_G - shifted_G.mean()


def _rloo(rewards_G: Tensor) -> Tensor:
    return _centered(rewards_G) * (rewards_G.numel() / (rewards_G.numel() - 1))


def _nft(rewards_G: Tensor) -> Tensor:
    correct_G = rewards_G == 1
    if not (correct_G | (rewards_G == 0)).all():
        raise ValueError(f"advantage 'nft': expected rewards of 0 or 1, got {rewards_G.tolist()}")
    mean = rewards_G.mean()
    signed_G = torch.where(correct_G, mean, -mean)
    return signed_G if 0 < mean < 1 else torch.zeros_like(rewards_G)


KINDS = {"grpo": _grpo, "dr_grpo": _centered, "rloo": _rloo, "nft": _nft}
