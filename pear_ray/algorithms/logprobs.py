"""Log-probabilities of a pack's tokens. The shift by one happens here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def predicted_logprobs(
    hidden_T: Tensor,
    head: Callable[[Tensor], Tensor],
    token_ids_T: Tensor,
    predicted: Tensor,
    num_chunks: int,
) -> tuple[Tensor, Tensor]:
    """Log-probability of chosen tokens given all before them, and the entropy at that place.

    The hidden state at t - 1 predicts token t. Logits are made for one chunk of tokens at a time,
    again in the backward pass, so that tokens x vocabulary never exists as a whole.

    Args:
        hidden_T: float [tokens, width], the decoder's output.
        head: [n, width] -> logits [n, vocabulary].
        token_ids_T: int64 [tokens].
        predicted: int64 [n], positions of the tokens in question; none is the first of its
            sequence (nothing predicts it).
        num_chunks: how often the head is used, however few tokens there are: under ZeRO-3 each
            use is a collective, of which all ranks need equally many.

    Returns:
        (logprobs float32 [n] with gradient, entropies float32 [n] in nats without).
    """
    logprobs, entropies = [], []
    for positions in predicted.tensor_split(num_chunks):
        chunk = checkpoint(
            _chunk, hidden_T[positions - 1], token_ids_T[positions], head, use_reentrant=False
        )
        logprobs.append(chunk[0])
        entropies.append(chunk[1])
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    log_softmax = head(hidden).float().log_softmax(-1)
    logprobs = log_softmax.gather(-1, targets[:, None])[:, 0]
    detached = log_softmax.detach()
    return logprobs, -(detached.exp() * detached).sum(-1)
