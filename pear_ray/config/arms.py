"""Keys of arms and of a study of them; labels of checkpoints."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import Field, model_validator

from pear_ray.config.base import Section

# The last training stage of an arm: its checkpoints are "after RL".
LAST_STAGES = ("rl", "cooperate")
# Stages that leave a checkpoint to evaluate.
TRAINING_STAGES = ("sft", *LAST_STAGES)


class Arm(Section):
    """One way through `sft` and `rl`, or `sft` and `cooperate`; arms share everything else."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Folder and label of the arm."""
    sft: dict[str, Any] | Literal[False] = Field({})
    """Keys of [sft] that differ in this arm; false: RL starts from the base model."""
    rl: dict[str, Any] = Field({})
    """Keys of [rl] that differ in this arm."""
    cooperate: dict[str, Any] | None = None
    """Keys of [cooperate] that differ in this arm; if set, even to {}, the arm runs `cooperate` instead of `rl`."""

    @property
    def last_stage(self) -> str:
        """The arm's last training stage."""
        return last_stage_with(self.cooperate)

    @property
    def stages(self) -> tuple[str, ...]:
        """The arm's training stages, in order."""
        return (self.last_stage,) if self.sft is False else ("sft", self.last_stage)


class Study(Section):
    """Stage `study`: every arm with several seeds."""

    seeds: tuple[int, ...] = ()
    """Each arm runs once with each of these seeds. Seeds and arms may be added later in the same run folder."""
    arms: tuple[str, ...] = ()
    """Arms that take part; empty: all."""
    max_parallel: int = Field(1, gt=0)
    """Runs at the same time, if the cluster has room for them."""
    baseline: str | None = None
    """Arm to which the others are compared; by default the first."""
    hypothesis: str = ""
    """Expected result, in words; stored before anything runs and shown in the report."""

    @model_validator(mode="after")
    def _check_seeds(self) -> Study:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: expected each one once, got {list(self.seeds)}")
        return self


def last_stage_with(cooperate: object) -> str:
    """Return the last training stage: `cooperate` if configured, else `rl`."""
    return "rl" if cooperate is None else "cooperate"


def is_after_rl(label: str) -> bool:
    """Return whether a checkpoint is that of a last training stage."""
    return label.rpartition("/")[-1] in LAST_STAGES


def start_of(label: str, evaluated: Collection[str]) -> str | None:
    """Return the label of the checkpoint that the training of `label` started from: "base" for SFT; for a last stage
    its arm's SFT if that was evaluated, else "base". None if `label` names no trained checkpoint."""
    prefix, slash, stage = label.rpartition("/")
    own = f"{prefix}{slash}sft"
    if is_after_rl(label) and own in evaluated:
        return own
    return "base" if stage in TRAINING_STAGES else None
