"""Causal attention within each sequence of a pack.

Registered in transformers under two names. `pack_varlen` (GPUs, bfloat16) is PyTorch's variable-length flash attention.
`pack_by_runs` (CPUs, float32) calls a causal kernel for each run of sequences of equal length, without mask or padding;
packs are sorted by length, so runs are few.
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


def kernel_name(dtype: str) -> str:
    """Return the fastest kernel's name for a model in `dtype` on this machine."""
    return VARLEN if torch.cuda.is_available() and dtype == "bfloat16" else BY_RUNS


def pack_layout(sequence_ids_T: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Return the keyword arguments by which both kernels know the sequences of a pack."""
    lengths = np.bincount(sequence_ids_T)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(torch.int32)
    return {"runs": equal_length_runs(lengths), "sequence_starts": starts.to(device), "longest": int(lengths.max())}


def equal_length_runs(lengths: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return (number of sequences, tokens in each) of each run of equal lengths, in pack order."""
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
    """Compute `attention_by_runs`, with a sliding window if the layer has one."""
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
    """Attend causally within each sequence: [1, heads, tokens, head size] to [1, tokens, heads, head size].

    Raises:
        ValueError: the layer has a sliding window shorter than a sequence.
    """
    longest = max(length for _, length in runs)
    if sliding_window is not None and sliding_window < longest:
        raise ValueError(
            f"sliding_window: expected at least {longest} tokens, the longest sequence, got {sliding_window}"
        )
    num_tokens = [number * length for number, length in runs]
    by_run = (states[0].split(num_tokens, 1) for states in (query, key, value))
    attended = []
    for run, *states_of_run in zip(runs, *by_run, strict=True):
        # [heads, tokens, size] viewed as [sequences, heads, length, size]
        q, k, v = (states.unflatten(1, run).transpose(0, 1) for states in states_of_run)
        is_grouped = query.shape[1] != key.shape[1]
        output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=is_grouped)
        attended.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)[None]


def transformers_attention(kernel: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Wrap a kernel in the signature that transformers calls. If a `group` of ranks shares the pack, each rank sends
    the states of its tokens and receives all tokens for its heads."""

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
            raise ValueError("attention: expected no sinks, got a model with attention sinks")
        if group is None:
            return kernel(query, key, value, **layout), None
        from deepspeed.sequence.layer import DistributedAttention

        def attend(*states: Tensor) -> Tensor:
            return kernel(*(state.transpose(1, 2) for state in states), **layout)

        exchange = DistributedAttention(attend, group, scatter_idx=2, gather_idx=1)
        return exchange(*(state.transpose(1, 2) for state in (query, key, value)), 0), None

    return attention


def no_mask(*_: Any, **__: Any) -> None:
    """Return no mask: the layout of the pack replaces it."""


for name, kernel in ((BY_RUNS, attention_by_runs), (VARLEN, varlen_attention)):
    AttentionInterface.register(name, transformers_attention(kernel))
    AttentionMaskInterface.register(name, no_mask)
