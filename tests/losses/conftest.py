"""Random trainable tokens, shared by the tests of losses, weights and objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from pear_ray.losses import LossInputs

VOCABULARY, STORED = 12, 5
ORIGINS = ("teacher_plain", "teacher_cipher", "elsewhere")


@pytest.fixture(scope="session")
def random_tokens() -> Callable[..., LossInputs]:
    """Return a function that creates the tokens of sequences with the given lengths (0 allowed), with teacher log-probs
    of the 5 likeliest of 12 tokens. With `spread` 0 both policies are equal."""
    return _random_tokens


def _random_tokens(
    seed: int, lengths: Sequence[int], spread: float = 0.2, coefficients: Sequence[float] = (1.0, -0.5, 0.0, 2.0)
) -> LossInputs:
    rng = np.random.default_rng(seed)
    n = int(np.sum(lengths))
    logprobs = torch.from_numpy(-rng.exponential(1.0, n)).float()
    teacher_logits = torch.from_numpy(rng.standard_normal((n, VOCABULARY)))
    noise = torch.from_numpy(rng.standard_normal((n, VOCABULARY)))
    teacher_logprobs, stored = teacher_logits.log_softmax(-1).topk(STORED)
    own = (teacher_logits + spread * noise).log_softmax(-1).gather(-1, stored)
    present = [length for length in lengths if length]
    return LossInputs(
        logprobs=logprobs.clone().requires_grad_(),
        entropies=torch.from_numpy(rng.uniform(0, 3, n)).float(),
        sampled_logprobs=logprobs + spread * torch.from_numpy(rng.standard_normal(n)).float(),
        coefficients=torch.from_numpy(rng.choice(coefficients, n)).float(),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        origins=tuple(ORIGINS[i % 3] for i in range(len(lengths))),
        # A micro-batch without tokens belongs to a step that has some.
        num_tokens_global=max(1, sum(present)),
        num_sequences_global=max(1, len(present)),
        top_masses=torch.from_numpy(rng.uniform(0.9, 1.0, n)).float(),
        teacher_logprobs=teacher_logprobs.float(),
        logprobs_of_teacher=own.float().requires_grad_(),
        reference_logprobs=logprobs + spread * torch.from_numpy(rng.standard_normal(n)).float(),
    )
