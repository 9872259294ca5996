"""From a job's words to what RL minimizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pear_ray.config import Job
from pear_ray.losses.policy import (
    ConstantLength,
    KlToReference,
    PolicyGradient,
    RatioInLoss,
    SequenceMean,
    TokenMean,
    TruncatedIS,
)
from pear_ray.losses.policy_losses import Cispo, Gspo, Nft, PolicyLoss, PpoClip
from pear_ray.records import Completion, RolloutGroup, TrainingSequence
from pear_ray.rl.alerts import FallingEntropy, LittleSignal, LowEntropy, Patience, TargetReached
from pear_ray.rl.overlong import every_token, trainable_unless_truncated


def objective_of(job: Job) -> PolicyGradient:
    """The objective that [rl] describes."""
    rl = job.rl
    losses: dict[str, Callable[[], PolicyLoss]] = {
        "ppo": lambda: PpoClip(*rl.clip),
        "gspo": lambda: Gspo(*rl.clip),
        "cispo": lambda: Cispo(*rl.clip),
        "nft": Nft,
    }
    aggregations: dict[str, Callable[[], TokenMean | SequenceMean | ConstantLength]] = {
        "token": TokenMean,
        "sequence": SequenceMean,
        "constant": lambda: ConstantLength(job.generator.max_new_tokens),
    }
    return PolicyGradient(
        losses[rl.loss](),
        RatioInLoss() if rl.importance_sampling == "ratio" else TruncatedIS(rl.largest_weight),
        aggregations[rl.loss_agg](),
        KlToReference(rl.kl_coefficient) if rl.kl_coefficient else None,
    )


def sequences_of(job: Job, groups: tuple[RolloutGroup, ...]) -> list[TrainingSequence]:
    """One sequence for each answer, its advantage on each token of the policy's own; none of these
    to learn in an answer that was cut, under `rl.overlong = "mask"`. The tokens of a trace that
    begins an answer are a trace's.

    Raises:
        RuntimeError: they were all cut.
    """
    learned = {"keep": every_token, "mask": trainable_unless_truncated}[job.rl.overlong]
    sequences = [
        sequence_of(group, answer, advantage, learned(answer))
        for group in groups
        for answer, advantage in zip(group.completions, group.advantages, strict=True)
    ]
    if not any(sequence.trainable.any() for sequence in sequences):
        raise RuntimeError(
            f'rl.overlong: read "mask", and all {len(sequences)} answers of a step were cut at'
            f" generator.max_new_tokens {job.generator.max_new_tokens}; expected room for some to"
            " end by themselves"
        )
    return sequences


def sequence_of(
    group: RolloutGroup, answer: Completion, advantage: float, trainable: np.ndarray
) -> TrainingSequence:
    """One answer of a group; `trainable` says which tokens of the policy's own are learned."""
    num_shown = len(answer.trace_ids)
    sequence = TrainingSequence.of(
        group.prompt_ids,
        answer.trace_ids + answer.token_ids,
        answer.trace_logprobs + answer.logprobs,
        advantage,
        group.problem_id,
        response_trainable=np.concatenate([np.ones(num_shown, bool), trainable]),
        reference_logprobs=(
            None
            if answer.reference_logprobs is None
            else (0.0,) * num_shown + answer.reference_logprobs
        ),
    )
    if not num_shown:
        return sequence
    from_trace = np.zeros(len(sequence.token_ids), bool)
    from_trace[len(group.prompt_ids) :][:num_shown] = True
    return replace(
        sequence,
        coefficients=np.where(from_trace, np.float32(1), sequence.coefficients),
        from_trace=from_trace,
    )


def warnings_of(job: Job) -> list[LowEntropy | FallingEntropy | LittleSignal]:
    """What a run is warned of."""
    return [LowEntropy(), FallingEntropy(), LittleSignal(job.rl.group_size)]


def ends_of(job: Job) -> list[Patience | TargetReached]:
    """What ends a run before its last step."""
    ends: list[Patience | TargetReached] = []
    if job.rl.early_stopping_patience:
        ends.append(Patience("pass_at_1", job.rl.early_stopping_patience))
    if job.rl.target_pass_rate is not None:
        ends.append(TargetReached("pass_at_1", job.rl.target_pass_rate))
    return ends
