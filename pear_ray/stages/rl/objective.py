"""From a job's words to what RL minimises."""

from __future__ import annotations

from collections.abc import Callable

from pear_ray.algorithms.overlong import trainable_unless_truncated
from pear_ray.algorithms.policy_gradients import (
    AsRatio,
    ConstantLength,
    KlToReference,
    PolicyGradient,
    SequenceMean,
    TokenMean,
    Truncated,
)
from pear_ray.algorithms.policy_losses import Cispo, Gspo, Nft, PolicyLoss, PpoClip
from pear_ray.algorithms.watch import FallingEntropy, LittleSignal, LowEntropy, NotImproved, Reached
from pear_ray.config import Job
from pear_ray.records import RolloutGroup, TrainingSequence


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
        AsRatio() if rl.correction == "ratio" else Truncated(rl.largest_weight),
        aggregations[rl.aggregation](),
        KlToReference(rl.kl_coefficient) if rl.kl_coefficient else None,
    )


def sequences_of(job: Job, groups: tuple[RolloutGroup, ...]) -> list[TrainingSequence]:
    """One sequence for each answer, its advantage on each token; none to learn in an answer that
    was cut, under `rl.overlong = "mask"`.

    Raises:
        RuntimeError: they were all cut.
    """
    sequences = [
        TrainingSequence.of(
            group.prompt_ids,
            answer.token_ids,
            answer.logprobs,
            advantage,
            group.problem_id,
            response_trainable=(
                trainable_unless_truncated(answer) if job.rl.overlong == "mask" else None
            ),
            reference_logprobs=answer.reference_logprobs,
        )
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


def warnings_of(job: Job) -> list[LowEntropy | FallingEntropy | LittleSignal]:
    """What a run is warned of."""
    return [LowEntropy(), FallingEntropy(), LittleSignal(job.rl.group_size)]


def ends_of(job: Job) -> list[NotImproved | Reached]:
    """What ends a run before its last step."""
    ends: list[NotImproved | Reached] = []
    if job.rl.stop_without_progress:
        ends.append(NotImproved("pass_at_1", job.rl.stop_without_progress))
    if job.rl.stop_at_pass_rate is not None:
        ends.append(Reached("pass_at_1", job.rl.stop_at_pass_rate))
    return ends
