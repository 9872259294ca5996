"""Log-probabilities of a pack's tokens. The shift by one happens here and nowhere else.

Logits exist for one chunk of tokens at a time, in the forward and in the backward pass, so that
tokens x vocabulary never exists as a whole. The whole computation is one node of the graph: the
output head is used once per pass, which under ZeRO-3 means that it is gathered once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Reading(NamedTuple):
    """What a model says at n places.

    `logprobs` float32 [n, m], of the m tokens asked for, with gradient. Without gradient, float32
    [n]: `entropies` in nats, and `top_masses`, the probability of the k likeliest tokens together
    (zeros where k is 0).
    """

    logprobs: Tensor
    entropies: Tensor
    top_masses: Tensor


def predicted_logprobs(
    hidden_T: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    predicted: Tensor,
    *,
    logits_mib: float,
    top_k: int = 0,
) -> Reading:
    """Log-probabilities of chosen tokens at chosen positions, given all tokens before them.

    The hidden state at t - 1 predicts position t.

    Args:
        hidden_T: float [tokens, width], the decoder's output.
        weight: float [vocabulary, width], the output head.
        token_ids: int64 [n, m], the tokens asked for at each position.
        predicted: int64 [n], the positions; none is the first of its sequence (nothing predicts
            it).
        logits_mib: memory for logits and their softmax. Where all fit, the softmax is kept for the
            backward pass; otherwise logits are made chunk by chunk, in both passes.
        top_k: tokens counted in `top_masses`.
    """
    bytes_per_token = 2 * 4 * weight.shape[0]
    tokens_per_chunk = max(1, int(logits_mib * 2**20) // bytes_per_token)
    hidden = hidden_T[predicted - 1]
    return Reading(*_Read.apply(hidden, weight, token_ids, tokens_per_chunk, top_k))


class _Read(torch.autograd.Function):
    """With p the softmax of the logits and g the gradient of the log-probs of tokens i, that of
    the logits is sum_i g_i (onehot_i - p)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, tokens_per_chunk: int, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_places = len(hidden)
        logprobs = hidden.new_empty(ids.shape, dtype=torch.float32)
        normalizers, entropies = hidden.new_empty((2, num_places), dtype=torch.float32)
        top_masses = hidden.new_zeros(num_places, dtype=torch.float32)
        logits_room, probs_room = (_room(hidden, weight, tokens_per_chunk) for _ in range(2))
        for part in chunks(num_places, tokens_per_chunk):
            log_softmax = _logits(hidden[part], weight, logits_room)
            probs = probs_room[: len(log_softmax)]
            largest = log_softmax.amax(-1)
            sums = torch.sub(log_softmax, largest[:, None], out=probs).exp_().sum(-1)
            normalizers[part] = sums.log() + largest
            log_softmax -= normalizers[part, None]
            logprobs[part] = log_softmax.gather(-1, ids[part])
            torch.exp(log_softmax, out=probs)
            entropies[part] = -log_softmax.mul_(probs).sum(-1)
            if top_k:
                top_masses[part] = probs.topk(top_k, sorted=False).values.sum(-1)
        is_kept = num_places <= tokens_per_chunk and any(ctx.needs_input_grad)
        ctx.probs = probs_room if is_kept else None
        # DeepSpeed fills and empties `weight.data` around each pass: the parameter itself is kept,
        # as a saved tensor would be the empty one.
        ctx.weight, ctx.tokens_per_chunk = weight, tokens_per_chunk
        ctx.save_for_backward(hidden, ids, normalizers)
        ctx.mark_non_differentiable(entropies, top_masses)
        return logprobs, entropies, top_masses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, ids, normalizers = ctx.saved_tensors
        weight, grad_logprobs = ctx.weight, grads[0]
        grad_hidden = torch.empty_like(hidden)
        # A sum over chunks, in float32 whatever the weights are in; a frozen head needs none.
        shape = weight.shape if ctx.needs_input_grad[1] else (0,)
        grad_weight = weight.new_zeros(shape, dtype=torch.float32)
        kept, ctx.probs = ctx.probs, None
        room = _room(hidden, weight, ctx.tokens_per_chunk) if kept is None else kept
        for part in chunks(len(hidden), ctx.tokens_per_chunk):
            if kept is None:
                probs = _logits(hidden[part], weight, room).sub_(normalizers[part, None]).exp_()
            else:
                probs = room
            grad = grad_logprobs[part]
            grad_logits = probs.mul_(-grad.sum(-1, keepdim=True)).scatter_add_(-1, ids[part], grad)
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[part] = grad_logits @ weight
            if ctx.needs_input_grad[1]:
                _add_product(grad_weight, grad_logits.T, hidden[part])
        needed = ctx.needs_input_grad
        return (
            grad_hidden if needed[0] else None,
            grad_weight.to(weight.dtype) if needed[1] else None,
            None,
            None,
            None,
        )


def chunks(num_places: int, places_per_chunk: int) -> Iterator[slice]:
    """Slices that cover all places in order; a single empty one where there are none."""
    for start in range(0, max(1, num_places), places_per_chunk):
        yield slice(start, min(num_places, start + places_per_chunk))


def _room(hidden: Tensor, weight: Tensor, num_places: int) -> Tensor:
    """Memory for a chunk, used by one after the other: on CPUs, taking it anew for each costs as
    much as what is computed in it."""
    shape = min(num_places, len(hidden)), len(weight)
    return hidden.new_empty(shape, dtype=torch.float32)


def _logits(hidden: Tensor, weight: Tensor, room: Tensor) -> Tensor:
    """float32 whatever the weights are in: rounded to bfloat16, a logit of 20 is off by up to .06,
    as much as PEAR's clip of a log-ratio."""
    logits = room[: len(hidden)]
    if weight.dtype == torch.float32:
        return torch.mm(hidden, weight.T, out=logits)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=logits)
    return torch.mm(hidden.float(), weight.float().T, out=logits)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
