"""From the configuration and the rollouts of a step to the loss and its training sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from pear_ray.config import Job
from pear_ray.losses.policy import (
    Cispo,
    ConstantLength,
    Gspo,
    KlToReference,
    Nft,
    PolicyGradient,
    PpoClip,
    RatioInLoss,
    SequenceMean,
    TokenMean,
    TruncatedIS,
)
from pear_ray.records import Completion, RolloutGroup, TrainingSequence


def build_rl_loss(job: Job) -> PolicyGradient:
    """Return the loss configured by [rl]."""
    rl = job.rl
    losses: dict[str, type[PpoClip | Gspo | Cispo]] = {"ppo": PpoClip, "gspo": Gspo, "cispo": Cispo}
    correction = rl.importance_sampling
    aggregations: dict[str, Callable[[], TokenMean | SequenceMean | ConstantLength]] = {
        "token": TokenMean,
        "sequence": SequenceMean,
        "constant": lambda: ConstantLength(job.generator.max_new_tokens),
    }
    return PolicyGradient(
        Nft() if rl.loss.type == "nft" else losses[rl.loss.type](*rl.loss.clip_ratio),
        RatioInLoss() if correction.type == "ratio" else TruncatedIS(correction.cap),
        aggregations[rl.loss_agg](),
        KlToReference(rl.kl_coefficient) if rl.kl_coefficient else None,
    )


def training_sequences(job: Job, groups: Sequence[RolloutGroup]) -> list[TrainingSequence]:
    """Return one sequence per completion, with its advantage on each token that the policy sampled.

    Raises:
        RuntimeError: no token is trainable, since every completion is masked as truncated.
    """
    sequences = [
        training_sequence(group, completion, advantage, trainable_mask(job, completion))
        for group in groups
        for completion, advantage in zip(group.completions, group.advantages, strict=True)
    ]
    if not any(sequence.trainable.any() for sequence in sequences):
        raise RuntimeError(
            "rl.mask_truncated: expected some completions to end within generator.max_new_tokens ="
            f" {job.generator.max_new_tokens}, got {len(sequences)} truncated ones, all masked"
        )
    return sequences


def trainable_mask(job: Job, completion: Completion) -> np.ndarray:
    """Return which sampled tokens of a completion are trained on, bool [tokens].

    If truncated completions are masked, none of theirs: overlong filtering (DAPO, arXiv 2503.14476 section 3.4). Their
    rewards still count in the mean of the group.
    """
    is_masked = job.rl.mask_truncated and completion.finish_reason == "length"
    return np.full(len(completion.token_ids), not is_masked)


def training_sequence(
    group: RolloutGroup, completion: Completion, advantage: float, trainable: np.ndarray
) -> TrainingSequence:
    """Return one completion as a sequence; `trainable` masks its sampled tokens, bool [tokens].

    Tokens of a demonstration prefix have coefficient 1 and are marked `from_demonstration`.
    """
    num_prefix = len(completion.prefix_ids)
    reference = completion.reference_logprobs
    sequence = TrainingSequence.of(
        group.prompt_ids,
        completion.prefix_ids + completion.token_ids,
        completion.prefix_logprobs + completion.logprobs,
        advantage,
        group.problem_id,
        response_trainable=np.concatenate([np.ones(num_prefix, bool), trainable]),
        reference_logprobs=None if reference is None else (0.0,) * num_prefix + reference,
    )
    if not num_prefix:
        return sequence
    from_demonstration = np.zeros(len(sequence.token_ids), bool)
    from_demonstration[len(group.prompt_ids) :][:num_prefix] = True
    return replace(
        sequence,
        coefficients=np.where(from_demonstration, np.float32(1), sequence.coefficients),
        from_demonstration=from_demonstration,
    )
