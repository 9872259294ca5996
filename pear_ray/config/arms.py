"""What a job may say of arms and of a study of them; their stages, and labels of checkpoints."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import Field, model_validator

from pear_ray.config.base import Section

# An arm ends with one of these; what comes out of either is called "after RL".
LAST_STAGES = ("rl", "cooperate")
# Stages that leave a checkpoint to evaluate.
TRAINING_STAGES = ("sft", *LAST_STAGES)


class Arm(Section):
    """One way through `sft` and `rl`, or `sft` and `cooperate`; arms share everything else."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Folder and label of the arm."""
    sft: dict[str, Any] | Literal[False] = Field({})
    """Keys of [sft] which this arm sets differently; false: RL starts from the model itself."""
    rl: dict[str, Any] = Field({})
    """Keys of [rl] which this arm sets differently."""
    cooperate: dict[str, Any] | None = None
    """Keys of [cooperate] which this arm sets differently; with it, if only as {}, the arm goes
    through `cooperate` instead of `rl`."""

    @property
    def last_stage(self) -> str:
        """The stage that the arm ends with."""
        return last_stage_with(self.cooperate)

    @property
    def stages(self) -> tuple[str, ...]:
        """What the arm goes through."""
        return (self.last_stage,) if self.sft is False else ("sft", self.last_stage)


class Study(Section):
    seeds: tuple[int, ...] = ()
    """Each arm goes through its stages once with each of these seeds; all else is shared. A study
    may grow: the same run folder takes more seeds, and more of the arms."""
    arms: tuple[str, ...] = ()
    """Arms that take part; none named: all."""
    max_parallel: int = Field(1, gt=0)
    """Runs of an arm with a seed that work side by side, where the cluster has room for them."""
    baseline: str | None = None
    """The arm with which the others are compared; without it the first."""
    hypothesis: str = ""
    """What is expected, in words. It is written down before anything runs, and the report shows
    it."""

    @model_validator(mode="after")
    def _seeds_differ(self) -> Study:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: read {list(self.seeds)}; expected each one once")
        return self


def last_stage_with(cooperate: object) -> str:
    """The stage that an arm, or a job without arms, ends with: this is what it says of
    `cooperate`."""
    return "rl" if cooperate is None else "cooperate"


def is_after_rl(label: str) -> bool:
    """Whether a checkpoint is one that an arm ends with."""
    return label.rpartition("/")[-1] in LAST_STAGES


def start_of(label: str, evaluated: Collection[str]) -> str | None:
    """What the training that ended in a checkpoint began with: SFT with the base, a last stage with
    its arm's SFT or, where the arm has none, with the base. None for a checkpoint of no
    training."""
    prefix, slash, stage = label.rpartition("/")
    own = f"{prefix}{slash}sft"
    if is_after_rl(label) and own in evaluated:
        return own
    return "base" if stage in TRAINING_STAGES else None
