"""Causal attention within each sequence of a pack.

Registered in transformers under two names. `pack_varlen` (GPUs, bfloat16) is PyTorch's variable-length flash attention.
`pack_by_runs` (CPUs, float32) calls a causal kernel for each run of sequences of equal length, without mask or padding;
packs are sorted by length, so runs are few.

Sequence parallelism as in DeepSpeed-Ulysses (arXiv 2309.14509): a group of ranks shares every pack. Each rank holds a
slice of its tokens, and inside attention all tokens of some heads. The per-token outputs, a few floats, are gathered
over the group, so that weights which sum over a response see all of it, wherever it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

BY_RUNS, VARLEN = "pack_by_runs", "pack_varlen"


def pack_layout(sequence_ids_T: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Return the keyword arguments by which both kernels know the sequences of a pack. `runs` has (number of sequences,
    tokens in each) of each run of equal lengths, in pack order."""
    lengths = np.bincount(sequence_ids_T)
    runs = tuple((len(list(same)), int(length)) for length, same in groupby(lengths))
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(torch.int32)
    return {"runs": runs, "sequence_starts": starts.to(device), "longest": int(lengths.max())}


def varlen_attention(
    *states: Tensor, scaling: float, sequence_starts: Tensor, longest: int, sliding_window: int | None = None, **_: Any
) -> Tensor:
    """Compute `attention_by_runs`, with a sliding window if the layer has one."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (state[0].transpose(0, 1) for state in states)
    bounds = (sequence_starts, sequence_starts, longest, longest)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    is_grouped = query.shape[1] != key.shape[1]
    attended: Any = varlen_attn(query, key, value, *bounds, scale=scaling, window_size=window, enable_gqa=is_grouped)
    return attended[None]


def attention_by_runs(
    *states: Tensor, scaling: float, runs: tuple[tuple[int, int], ...], sliding_window: int | None = None, **_: Any
) -> Tensor:
    """Attend causally within each sequence. Query, key and value [1, heads, tokens, head size] give [1, tokens, heads,
    head size]. Raise ValueError if the layer has a sliding window shorter than a sequence."""
    longest = max(length for _, length in runs)
    if sliding_window is not None and sliding_window < longest:
        raise ValueError(
            f"sliding_window: expected at least {longest} tokens, the longest sequence, got {sliding_window}"
        )
    num_tokens = [number * length for number, length in runs]
    by_run = (state[0].split(num_tokens, 1) for state in states)
    attended = []
    for run, *states_of_run in zip(runs, *by_run, strict=True):
        # [heads, tokens, size] viewed as [sequences, heads, length, size]
        query, key, value = (state.unflatten(1, run).transpose(0, 1) for state in states_of_run)
        is_grouped = query.shape[1] != key.shape[1]
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=is_grouped)
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


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share packs with this one, and this rank's index among them."""

    process_group: Any
    index: int
    size: int

    @classmethod
    def create(cls, size: int, timeout_seconds: float) -> SequenceGroup:
        """Group neighboring ranks by `size`; collective over all ranks."""
        timeout = timedelta(seconds=timeout_seconds)
        # Every rank must take part in the creation of every group.
        firsts = range(0, dist.get_world_size(), size)
        groups = [dist.new_group(list(range(first, first + size)), timeout) for first in firsts]
        return cls(groups[dist.get_rank() // size], dist.get_rank() % size, size)

    def slice_inputs(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], slice]:
        """Return this rank's slice of `model.policy_inputs`, and the slice of the predictions that its hidden states
        make; each predicts the next token."""
        num_tokens = len(inputs["packed_ids_T"]) // self.size
        start = self.index * num_tokens
        edges = torch.tensor([start, start + num_tokens], device=inputs["predicted"].device)
        own = slice(*torch.searchsorted(inputs["predicted"] - 1, edges).tolist())
        sliced = {name: inputs[name][start : start + num_tokens] for name in ("packed_ids_T", "position_ids_T")}
        sliced |= {"token_ids": inputs["token_ids"][own], "predicted": inputs["predicted"][own] - start}
        return {**inputs, **sliced, "group": self.process_group}, own

    def gather(self, values: Tensor, own: slice, num_predictions: int) -> Tensor:
        """Return the group's values [num_predictions, ...], of which this rank has computed `own`. Only these carry a
        gradient: summed over ranks, gradients are those of the whole pack."""
        gathered = values.new_zeros((num_predictions, *values.shape[1:]))
        gathered[own] = values.detach()
        dist.all_reduce(gathered, group=self.process_group)
        return torch.cat([gathered[: own.start], values, gathered[own.stop :]])


for name, kernel in ((BY_RUNS, attention_by_runs), (VARLEN, varlen_attention)):
    AttentionInterface.register(name, transformers_attention(kernel))
    # The layout of the pack replaces the mask.
    AttentionMaskInterface.register(name, lambda *_, **__: None)
