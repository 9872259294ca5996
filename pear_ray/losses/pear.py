"""PEAR's importance weights (arXiv 2602.01058, sections 3.2-3.5 and 3.7).

With delta_t = log pi_theta(y_t) - log pi_beta(y_t), clipped per token, and t = 1..T over the
response, the log-weight of a token is

    token     (T - t) ln(discount) + sum of delta_j over j > t
    block     (T - e) ln(discount) + sum of delta_j over j > e,  e = last token of t's block
    sequence  sum of delta_j over all j

clipped again, then exponentiated. The suffix excludes the token itself, so the last token's
weight is always 1 at level "token". Sums run in float64: a pack may hold 10^5 tokens, and a
difference of float32 prefix sums would lose what the first clip keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def pear_weights(
    target_logprobs: Tensor,
    behavior_logprobs: Tensor,
    sequence_ids: Tensor,
    *,
    level: str,
    discount: float = 0.999,
    block_size: int = 4,
    clip_log_ratio: tuple[float, float] = (-0.08, 0.3),
    clip_log_weight: tuple[float, float] = (-10.0, 5.0),
) -> Tensor:
    """Importance weight of every response token, without gradient and without a host sync.

    Args:
        target_logprobs: float [tokens], nats, under the model in training.
        behavior_logprobs: float [tokens], nats, under the policy that wrote the tokens.
        sequence_ids: int [tokens]; the tokens of one response are contiguous and share an id
            that the next response does not have.
        level: "token", "block" or "sequence".
        discount: per token of suffix, in (0, 1]; not used at level "sequence".
        block_size: tokens in a block, counted from the start of each response.
        clip_log_ratio: bounds of delta_t, before any sum.
        clip_log_weight: bounds of the log-weight.

    Returns:
        Tensor of the shape and dtype of `target_logprobs`.

    Raises:
        ValueError: unknown level, shapes that differ, or a setting out of range.
    """
    if level not in LOG_WEIGHTS:
        raise ValueError(f"level: read {level!r}; expected one of {sorted(LOG_WEIGHTS)}")
    if not target_logprobs.shape == behavior_logprobs.shape == sequence_ids.shape:
        raise ValueError(
            f"expected three tensors of one shape, read {tuple(target_logprobs.shape)},"
            f" {tuple(behavior_logprobs.shape)} and {tuple(sequence_ids.shape)}"
        )
    if target_logprobs.ndim != 1:
        raise ValueError(f"expected 1-D tensors, read {target_logprobs.ndim} dimensions")
    if not 0 < discount <= 1 or block_size < 1:
        raise ValueError(
            f"read discount {discount} and block_size {block_size}; expected (0, 1] and >= 1"
        )
    if target_logprobs.numel() == 0:
        return torch.empty_like(target_logprobs)
    delta = (target_logprobs.detach().double() - behavior_logprobs.detach().double()).clamp(
        *clip_log_ratio
    )
    segments = SequenceSegments.of(delta, sequence_ids)
    log_weights = LOG_WEIGHTS[level](segments, math.log(discount), block_size)
    return log_weights.clamp(*clip_log_weight).exp().to(target_logprobs.dtype)


@dataclass(frozen=True)
class SequenceSegments:
    """Prefix sums of delta over a pack, and where each token's response begins and ends.

    All fields are [tokens]: `prefix` float64 inclusive sums over the whole pack, `delta` float64,
    `first`, `last` and `index` int64 positions in the pack.
    """

    prefix: Tensor
    delta: Tensor
    first: Tensor
    last: Tensor
    index: Tensor

    @classmethod
    def of(cls, delta: Tensor, sequence_ids: Tensor) -> SequenceSegments:
        num_tokens = delta.numel()
        index = torch.arange(num_tokens, device=delta.device)
        edge = sequence_ids[1:] != sequence_ids[:-1]
        end = torch.ones(1, dtype=torch.bool, device=delta.device)
        first = torch.where(torch.cat([end, edge]), index, 0).cummax(0).values
        last = (
            torch.where(torch.cat([edge, end]), index, num_tokens).flip(0).cummin(0).values.flip(0)
        )
        return cls(delta.cumsum(0), delta, first, last, index)

    def after(self, position: Tensor) -> Tensor:
        """Sum of delta over the tokens of the same response behind `position`."""
        return self.prefix[self.last] - self.prefix[position]


def _token(segments: SequenceSegments, log_discount: float, block_size: int) -> Tensor:
    remaining = (segments.last - segments.index).double()
    return remaining * log_discount + segments.after(segments.index)


def _block(segments: SequenceSegments, log_discount: float, block_size: int) -> Tensor:
    block = (segments.index - segments.first) // block_size
    block_end = torch.minimum(segments.first + (block + 1) * block_size - 1, segments.last)
    remaining = (segments.last - block_end).double()
    return remaining * log_discount + segments.after(block_end)


def _sequence(segments: SequenceSegments, log_discount: float, block_size: int) -> Tensor:
    return segments.after(segments.first) + segments.delta[segments.first]


LOG_WEIGHTS = {"token": _token, "block": _block, "sequence": _sequence}
