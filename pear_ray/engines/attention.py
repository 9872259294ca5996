"""Attention over a pack of sequences, none of which sees another.

Registered in transformers under the name `pack`. The pack is unfolded to [sequences, longest]
with padding behind each sequence, where a causal kernel needs no mask and so skips half the
work; a padded place comes after every real one and so is never attended to by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "pack"


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


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    unfold: Tensor,
    fold: Tensor,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
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
    return attended.transpose(1, 2).flatten(0, 1)[fold][None], None


def no_mask(*_: Any, **__: Any) -> None:
    """The unfolding is the mask."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, no_mask)
