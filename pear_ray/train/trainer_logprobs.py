"""The trainer's forward pass without training: what the learner will say of tokens at step 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pear_ray.losses.packing import pack
from pear_ray.records import TrainingSequence
from pear_ray.train.model import PackedPolicy, load_policy, policy_inputs


def trainer_logprobs(
    path: str,
    dtype: str,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    tokens_per_pack: int,
    num_threads: int,
) -> list[np.ndarray]:
    """Log-probs of the response tokens of each (prompt_ids, response_ids), float32, from the same
    code, precision and packing that the learner uses. On GPUs the model is spread over all that
    this process may use."""
    torch.set_num_threads(num_threads)
    on_gpu = torch.cuda.is_available()
    policy = load_policy(path, dtype, device_map="auto" if on_gpu else None).eval()
    device = torch.device("cuda" if on_gpu else "cpu")
    return policy_logprobs(policy, rows, tokens_per_pack, device)


@torch.no_grad()
def policy_logprobs(
    policy: PackedPolicy,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    tokens_per_pack: int,
    device: torch.device,
) -> list[np.ndarray]:
    """The same, of a policy that is there."""
    sequences = [
        TrainingSequence.of(prompt, response, np.zeros(len(response)), 1.0, str(number))
        for number, (prompt, response) in enumerate(rows)
    ]
    found: dict[int, np.ndarray] = {}
    (packs,) = pack(sequences, 1, tokens_per_pack)
    for batch in packs:
        logprobs = policy(**policy_inputs(batch, device))[0][:, 0].cpu().numpy()
        lengths = np.bincount(batch.sequence_ids_T[batch.trainable_T])
        pieces = np.split(logprobs, np.cumsum(lengths)[:-1])
        found |= {int(name): piece for name, piece in zip(batch.origins, pieces, strict=True)}
    return [found[number] for number in range(len(rows))]
