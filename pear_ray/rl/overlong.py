"""Answers that are too long, or that the sampler cut off: lower rewards for the ones, nothing to
learn from the others."""

from __future__ import annotations

import numpy as np

from pear_ray.records import Completion


def soft_punishment(num_tokens: int, max_tokens: int, cache_tokens: int) -> float:
    """What is added to the reward of an answer for its length (DAPO, arXiv 2503.14476 section 3.4,
    eq. 13): 0 up to max_tokens - cache_tokens, falling linearly to -1 at max_tokens, and -1 beyond.

    Args:
        num_tokens: length of the answer.
        max_tokens: the length from which on the punishment is whole.
        cache_tokens: tokens before `max_tokens` over which it grows.

    Returns:
        Between -1 and 0, in units of the reward.

    Raises:
        ValueError: not 0 < cache_tokens <= max_tokens.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise ValueError(
            f"cache_tokens: read {cache_tokens}; expected 1 to max_tokens = {max_tokens}"
        )
    return max(-1.0, min(0.0, (max_tokens - cache_tokens - num_tokens) / cache_tokens))


def every_token(completion: Completion) -> np.ndarray:
    """Which tokens of an answer are learned, bool [tokens]: all that the policy sampled."""
    return np.ones(len(completion.token_ids), bool)


def trainable_unless_truncated(completion: Completion) -> np.ndarray:
    """Which tokens of an answer are learned, bool [tokens]: none where the sampler stopped it at
    its limit, all of any other (overlong filtering, arXiv 2503.14476 section 3.4). Its reward stays
    part of its group's mean."""
    return np.full(len(completion.token_ids), completion.finish_reason != "length")
