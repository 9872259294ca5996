"""Attention over a pack of sequences, none of which sees another.

Registered in transformers under two names. `pack_varlen` (GPUs, bfloat16) is PyTorch's own
variable-length flash attention. `pack_by_runs`, for CPUs and float32, is a causal kernel for each
run of sequences of one length, which needs neither mask nor padding: packs have their sequences in
order of length, so runs are few.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

BY_RUNS, VARLEN = "pack_by_runs", "pack_varlen"


def best(dtype: str) -> str:
    """The name of the attention for a model in `dtype` on this machine."""
    return VARLEN if torch.cuda.is_available() and dtype == "bfloat16" else BY_RUNS


def layout(sequence_ids_T: np.ndarray, device: torch.device) -> dict[str, Any]:
    """What either attention wants to know of a pack."""
    lengths = np.bincount(sequence_ids_T)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(torch.int32)
    return {
        "runs": runs(lengths),
        "sequence_starts": starts.to(device),
        "longest": int(lengths.max()),
    }


def runs(lengths: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Neighbours of one length: (how many sequences, tokens in each), in the order of the pack."""
    return tuple((len(list(same)), int(length)) for length, same in groupby(lengths))


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
    """The same as `attention_by_runs`, and with a sliding window where the model has one."""
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


def attention_by_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    runs: tuple[tuple[int, int], ...],
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    """Causal attention within each sequence. Tensors are [1, heads, tokens, head size]; the
    result is [1, tokens, heads, head size].

    Raises:
        ValueError: the layer wants a sliding window, which is not offered here.
    """
    longest = max(length for _, length in runs)
    if sliding_window is not None and sliding_window < longest:
        raise ValueError(
            f"the model's attention has a sliding window of {sliding_window}; expected full"
            f" attention for sequences of up to {longest} tokens"
        )
    num_tokens = [number * length for number, length in runs]
    by_run = (states[0].split(num_tokens, 1) for states in (query, key, value))
    attended = []
    for run, *of_run in zip(runs, *by_run, strict=True):
        # [heads, tokens, size] as [sequences, heads, length, size], without a copy
        q, k, v = (states.unflatten(1, run).transpose(0, 1) for states in of_run)
        with_groups = query.shape[1] != key.shape[1]
        found = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=with_groups
        )
        attended.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)[None]


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


for name, function in ((BY_RUNS, attention_by_runs), (VARLEN, varlen_attention)):
    AttentionInterface.register(name, as_called(function))
    AttentionMaskInterface.register(name, no_mask)
