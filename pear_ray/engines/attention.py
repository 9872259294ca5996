"""Attention over a pack of sequences, none of which sees another.

Registered in transformers under two names. `pack_varlen` (GPUs, bfloat16) is PyTorch's own
variable-length flash attention. `pack_unfolded` is the same by other means, for CPUs and float32:
the pack is unfolded to [sequences, longest] with padding behind each sequence, where a causal
kernel needs no mask and so skips half the work; a padded place comes after every real one and so is
never attended to by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

UNFOLDED, VARLEN = "pack_unfolded", "pack_varlen"


def best(dtype: str) -> str:
    """The name of the attention for a model in `dtype` on this machine."""
    return VARLEN if torch.cuda.is_available() and dtype == "bfloat16" else UNFOLDED


def layout(sequence_ids_T: np.ndarray, device: torch.device) -> dict[str, Any]:
    """What either attention wants to know of a pack."""
    lengths = np.bincount(sequence_ids_T)
    unfold, fold = unfolding(sequence_ids_T)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(torch.int32)
    return {
        "unfold": unfold.to(device),
        "fold": fold.to(device),
        "sequence_starts": starts.to(device),
        "longest": int(lengths.max()),
    }


def unfolding(sequence_ids_T: np.ndarray) -> tuple[Tensor, Tensor]:
    """How to unfold a pack, and how to fold it again.

    Returns:
        (unfold, fold): unfold int64 [sequences, longest], the packed position of each place (0
        where there is padding); fold int64 [tokens], the place of each packed position in the
        flattened [sequences * longest].
    """
    lengths = np.bincount(sequence_ids_T)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    offsets = np.arange(lengths.max())
    unfold = np.where(offsets < lengths[:, None], starts[:, None] + offsets, 0)
    within = np.arange(len(sequence_ids_T)) - starts[sequence_ids_T]
    fold = sequence_ids_T * len(offsets) + within
    return torch.from_numpy(unfold), torch.from_numpy(fold)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    sequence_starts: Tensor,
    longest: int,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    """The same as `unfolded_attention`, and with a sliding window where the model has one."""
    from torch.nn.attention.varlen import varlen_attn

    attended: Any = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        sequence_starts,
        sequence_starts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[None]


def unfolded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    unfold: Tensor,
    fold: Tensor,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    """Causal attention within each sequence. Tensors are [1, heads, tokens, head size]; the
    result is [1, tokens, heads, head size].

    Raises:
        ValueError: the layer wants a sliding window, which is not offered here.
    """
    if sliding_window is not None and sliding_window < unfold.shape[1]:
        raise ValueError(
            f"the model's attention has a sliding window of {sliding_window}; expected full"
            f" attention for sequences of up to {unfold.shape[1]} tokens"
        )

    def unfolded(states: Tensor) -> Tensor:
        return states[0, :, unfold].transpose(0, 1)

    attended = scaled_dot_product_attention(
        unfolded(query),
        unfolded(key),
        unfolded(value),
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2).flatten(0, 1)[fold][None]


def as_called(kernel: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """A kernel as transformers calls it. Where a `group` of ranks shares the pack, each sends the
    states of its tokens and receives those of all tokens, for its share of the heads."""

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        group: Any = None,
        s_aux: Tensor | None = None,
        **layout: Any,
    ) -> tuple[Tensor, None]:
        if s_aux is not None:
            raise ValueError("the model's attention has sinks; expected one without")
        if group is None:
            return kernel(query, key, value, **layout), None
        from deepspeed.sequence.layer import DistributedAttention

        def attend(*states: Tensor) -> Tensor:
            return kernel(*(state.transpose(1, 2) for state in states), **layout)

        exchanged = DistributedAttention(attend, group, scatter_idx=2, gather_idx=1)
        return exchanged(*(state.transpose(1, 2) for state in (query, key, value)), 0), None

    return attention


def no_mask(*_: Any, **__: Any) -> None:
    """The layout is the mask."""


for name, function in ((UNFOLDED, unfolded_attention), (VARLEN, varlen_attention)):
    AttentionInterface.register(name, as_called(function))
    AttentionMaskInterface.register(name, no_mask)
