"""From the rewards of one problem's group of answers to their advantages."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards_G: Tensor, kind: str) -> Tensor:
    """How much better each answer is than its group.

    grpo     (r - mean) / std, with the sample standard deviation (DeepSeekMath, arXiv 2402.03300)
    dr_grpo  r - mean (arXiv 2503.20783: without the division no group counts more for being
             easy or hard)
    rloo     r minus the mean of the OTHER answers (arXiv 2402.14740)
    nft      for `policy_losses.Nft` alone, which reads two things off one number: the mean for a
             right answer, minus the mean for a wrong one (arXiv 2505.18116)

    Args:
        rewards_G: float [group size], at least 2; for nft each 0 (wrong) or 1 (right).
        kind: one of the four names.

    Returns:
        Tensor [group size]; all zero where all rewards are equal.

    Raises:
        ValueError: unknown kind, a group of fewer than two, or for nft another reward than 0 and 1.
    """
    if kind not in KINDS:
        raise ValueError(f"advantage: read {kind!r}; expected one of {sorted(KINDS)}")
    if rewards_G.ndim != 1 or rewards_G.numel() < 2:
        raise ValueError(
            f"expected at least 2 rewards in one dimension, read {tuple(rewards_G.shape)}"
        )
    return KINDS[kind](rewards_G)


# Keeps groups without spread at zero instead of dividing rounding noise by nothing.
MIN_STD = 1e-6


def _grpo(rewards_G: Tensor) -> Tensor:
    centered_G = _centered(rewards_G)
    variance = centered_G.square().sum() / (centered_G.numel() - 1)
    return centered_G / (variance.sqrt() + MIN_STD)


def _centered(rewards_G: Tensor) -> Tensor:
    # Measured from the first reward, equal rewards are exactly 0; their mean may be a rounding off.
    shifted_G = rewards_G - rewards_G[0]
    return shifted_G - shifted_G.mean()


def _rloo(rewards_G: Tensor) -> Tensor:
    return _centered(rewards_G) * (rewards_G.numel() / (rewards_G.numel() - 1))


def _nft(rewards_G: Tensor) -> Tensor:
    right_G = rewards_G == 1
    if not (right_G | (rewards_G == 0)).all():
        raise ValueError(
            f"advantage 'nft': read rewards {rewards_G.tolist()}; expected each to be 0 or 1"
        )
    mean = rewards_G.mean()
    signed_G = torch.where(right_G, mean, -mean)
    return signed_G if 0 < mean < 1 else torch.zeros_like(rewards_G)


KINDS = {"grpo": _grpo, "dr_grpo": _centered, "rloo": _rloo, "nft": _nft}
