"""Log-probabilities of a pack's tokens. The shift by one happens here and nowhere else.

Logits exist for one chunk of tokens at a time, in the forward and in the backward pass; the full [tokens, vocabulary]
matrix is never materialized. The whole computation is one autograd node, so under ZeRO-3 the output head is gathered
once per pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class TokenLogprobs(NamedTuple):
    """Outputs of the model at n positions, in float32."""

    logprobs: Tensor  # [n, m], of the m requested tokens, with gradient
    entropies: Tensor  # [n], in nats, detached
    top_masses: Tensor  # [n], total probability of the k likeliest tokens, detached; zeros if k is 0


def predicted_logprobs(
    hidden_T: Tensor, weight: Tensor, token_ids: Tensor, predicted: Tensor, *, logits_mib: float, top_k: int = 0
) -> TokenLogprobs:
    """Return log-probabilities of the requested tokens at the requested positions.

    Args:
        hidden_T: float [tokens, width], the decoder's output; the one at t - 1 predicts position t.
        weight: float [vocabulary, width], the output head.
        token_ids: int64 [n, m], the requested tokens of each position.
        predicted: int64 [n], the positions; none is the first of its sequence.
        logits_mib: memory for logits and their softmax. If all positions fit, the softmax is kept for the backward
            pass; otherwise both passes compute logits chunk by chunk.
        top_k: number of tokens in `top_masses`.
    """
    bytes_per_token = 2 * 4 * len(weight)
    tokens_per_chunk = max(1, int(logits_mib * 2**20) // bytes_per_token)
    return TokenLogprobs(*_Logprobs.apply(hidden_T[predicted - 1], weight, token_ids, tokens_per_chunk, top_k))


class _Logprobs(torch.autograd.Function):
    """With p the softmax of the logits and g_i the gradient of the log-prob of token i, the gradient of the logits is
    sum_i g_i (onehot_i - p)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, tokens_per_chunk: int, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs = hidden.new_empty(ids.shape, dtype=torch.float32)
        normalizers, entropies = hidden.new_empty((2, len(hidden)), dtype=torch.float32)
        top_masses = hidden.new_zeros(len(hidden), dtype=torch.float32)
        logits_buffer = _chunk_buffer(hidden, weight, tokens_per_chunk)
        probs_buffer = _chunk_buffer(hidden, weight, tokens_per_chunk)
        for chunk in chunks(len(hidden), tokens_per_chunk):
            log_softmax = _logits(hidden[chunk], weight, logits_buffer)
            probs = probs_buffer[: len(log_softmax)]
            largest = log_softmax.amax(-1)
            sums = torch.sub(log_softmax, largest[:, None], out=probs).exp_().sum(-1)
            normalizers[chunk] = sums.log() + largest
            log_softmax -= normalizers[chunk, None]
            logprobs[chunk] = log_softmax.gather(-1, ids[chunk])
            torch.exp(log_softmax, out=probs)
            entropies[chunk] = -log_softmax.mul_(probs).sum(-1)
            if top_k:
                top_masses[chunk] = probs.topk(top_k, sorted=False).values.sum(-1)
        keeps_probs = len(hidden) <= tokens_per_chunk and any(ctx.needs_input_grad)
        ctx.probs = probs_buffer if keeps_probs else None
        # Not save_for_backward: DeepSpeed fills and empties `weight.data` around each pass, and a saved tensor would be
        # the empty one.
        ctx.weight = weight
        ctx.tokens_per_chunk = tokens_per_chunk
        ctx.save_for_backward(hidden, ids, normalizers)
        ctx.mark_non_differentiable(entropies, top_masses)
        return logprobs, entropies, top_masses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, ids, normalizers), weight = ctx.saved_tensors, ctx.weight
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden)
        # Summed over chunks in float32, whatever the dtype of the weights.
        grad_weight = weight.new_zeros(weight.shape if needs_weight else (0,), dtype=torch.float32)
        kept_probs, ctx.probs = ctx.probs, None
        if kept_probs is None:
            buffer = _chunk_buffer(hidden, weight, ctx.tokens_per_chunk)
        for chunk in chunks(len(hidden), ctx.tokens_per_chunk):
            probs = kept_probs
            if probs is None:
                probs = _logits(hidden[chunk], weight, buffer).sub_(normalizers[chunk, None]).exp_()
            grad = grads[0][chunk]
            grad_logits = probs.mul_(-grad.sum(-1, keepdim=True)).scatter_add_(-1, ids[chunk], grad).to(weight.dtype)
            grad_hidden[chunk] = grad_logits @ weight
            if needs_weight and weight.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.T, hidden[chunk])
            elif needs_weight:
                grad_weight += grad_logits.T @ hidden[chunk]
        weight_gradient = grad_weight.to(weight.dtype) if needs_weight else None
        return grad_hidden if needs_hidden else None, weight_gradient, None, None, None


def chunks(num_positions: int, positions_per_chunk: int) -> Iterator[slice]:
    """Yield slices that cover all positions in order; a single empty one if there are none."""
    for start in range(0, max(1, num_positions), positions_per_chunk):
        yield slice(start, min(num_positions, start + positions_per_chunk))


def _chunk_buffer(hidden: Tensor, weight: Tensor, num_positions: int) -> Tensor:
    """Return memory for one chunk, reused by all: on CPUs, allocating it for each costs as much as the computation."""
    return hidden.new_empty((min(num_positions, len(hidden)), len(weight)), dtype=torch.float32)


def _logits(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Return float32 logits, whatever the dtype of the weights: rounded to bfloat16, a logit of 20 is off by up to .06,
    nearly PEAR's clip of a log-ratio."""
    logits = buffer[: len(hidden)]
    if weight.dtype == torch.float32:
        return torch.mm(hidden, weight.T, out=logits)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=logits)
    return torch.mm(hidden.float(), weight.float().T, out=logits)
