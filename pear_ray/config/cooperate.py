"""What a job may say of stage `cooperate`, which learns from rollouts and from offline traces."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pear_ray.config.base import Section
from pear_ray.config.errors import format_validation_error
from pear_ray.config.rl import Rl
from pear_ray.config.sft import Learner, Lora, Optimizer, Sft

Share = Annotated[float, Field(ge=0, le=1)]

# Keys that only one method reads.
OWN_KEYS = {
    "alternate": ("frozen_frac",),
    "bridge": (
        "lora",
        "lora_learning_rate",
        "meta_objective",
        "refresh_steps",
        "shadow_offload",
    ),
    "trapo": ("prefix_groups", "prefix_fracs", "prefix_returns"),
}

# Keys of [sft] that say how long and with which optimizer it trains.
OF_STAGE_SFT = ("epochs", *Optimizer.model_fields)


class Cooperate(Section):
    """Rollouts are as [rl] says and traces as [sft] says; steps and optimizer are [rl]'s."""

    method: Literal["sum", "alternate", "bridge", "trapo"] = "sum"
    """One loss of both signals; an optimizer step on rollouts and then one on traces; BRIDGE; or
    TRAPO, where the policy goes on from the beginnings of traces."""
    rl_weight: Share = 0.5
    """sum and bridge: share of the rollouts in the loss, lambda; 1 is `rl`, 0 is `sft`."""
    rl_weight_final: Share | None = None
    """The same in the last step, with a straight line between; without it all steps are alike."""
    traces: Literal["all", "failed"] = "all"
    """Which traces a step learns from: the next rows of the corpus, or those of the problems that
    its own rollouts failed (MIFO). Not for trapo."""
    failed_pass_rate: float = Field(0.0, ge=0, lt=1)
    """A problem with at most this share of right answers has failed."""
    entropy_top_frac: float = Field(1.0, gt=0, le=1)
    """Share of each trace's tokens that are learned, those of the highest entropy (MIFO)."""
    frozen_frac: float = Field(0.0, ge=0, lt=1)
    """alternate: share of each parameter that the step on traces leaves alone, those elements which
    the step on rollouts moved most (MIFO)."""
    sft: dict[str, Any] = Field({})
    """Keys of [sft] that are different for the traces here. trapo's objective is "trsft" unless it
    is said here."""
    lora: Lora = Lora()
    """bridge: the adapters beside the weights."""
    lora_learning_rate: float | None = Field(None, gt=0)
    """bridge: the adapters' learning rate; without it ten times the weights'."""
    meta_objective: bool = True
    """bridge: adapters learn what the traces gain for RL, for which a shadow of the weights sees
    RL alone; without it they learn as the weights do, and there is no shadow."""
    refresh_steps: int = Field(0, ge=0)
    """bridge: steps after which the shadow's weights become the policy's again; 0: never."""
    shadow_offload: Literal["none", "optimizer", "parameters"] = "none"
    """bridge: what of the shadow a GPU leaves to the memory of its machine."""
    prefix_groups: tuple[Annotated[int, Field(gt=0)], ...] = (4, 2, 1, 1)
    """trapo: answers of a problem that are sampled together, one group after another."""
    prefix_fracs: tuple[Share, ...] = (0.0, 0.2, 0.5, 1.0)
    """trapo: share of a trace that each group's answers begin with."""
    prefix_returns: tuple[float, ...] = (-1.0, 0.5, 0.7, 0.9)
    """trapo: a group gets its beginning only where the mean reward of the problem's answers so far
    is lower."""

    @property
    def last_rl_weight(self) -> float:
        """`rl_weight_final`, or what stands for it."""
        return self.rl_weight if self.rl_weight_final is None else self.rl_weight_final

    def sft_of(self, sft: Sft) -> Sft:
        """How traces are learned, in a job with this [sft]."""
        own = {"objective": "trsft"} if self.method == "trapo" else {}
        return Sft(**{**sft.model_dump(), **own, **self.sft})

    @model_validator(mode="after")
    def _keys_agree(self) -> Cooperate:
        fields = type(self).model_fields
        changed = {name for name in fields if getattr(self, name) != fields[name].default}
        for method, keys in OWN_KEYS.items():
            for key in keys:
                if key in changed and self.method != method:
                    raise ValueError(
                        f"{key}: read {getattr(self, key)!r} with method {self.method!r}; only"
                        f" {method!r} has it"
                    )
        if self.method in ("alternate", "trapo") and {"rl_weight", "rl_weight_final"} & changed:
            raise ValueError(
                f"rl_weight: read {self.rl_weight} to {self.last_rl_weight} with method"
                f' {self.method!r}, which has no such share; expected "sum" or "bridge"'
            )
        if self.method == "trapo" and self.traces != "all":
            raise ValueError(
                f'traces: read {self.traces!r} with method "trapo", whose traces are the beginnings'
                ' of answers; expected "all"'
            )
        if "failed_pass_rate" in changed and self.traces != "failed":
            raise ValueError(
                f"failed_pass_rate: read {self.failed_pass_rate} with traces {self.traces!r};"
                ' expected "failed"'
            )
        for key in ("refresh_steps", "shadow_offload"):
            if key in changed and not self.meta_objective:
                raise ValueError(
                    f"{key}: read {getattr(self, key)!r} without meta_objective, where there is no"
                    f" shadow; expected {fields[key].default!r}"
                )
        for key in OF_STAGE_SFT:
            if key in self.sft:
                raise ValueError(
                    f"sft.{key}: read {self.sft[key]!r}; steps and optimizer are those of [rl],"
                    " expected none"
                )
        if self.lora.dropout:
            raise ValueError(
                f"lora.dropout: read {self.lora.dropout}; adapters beside trained weights drop"
                " nothing, expected 0"
            )
        lengths = [len(self.prefix_groups), len(self.prefix_fracs), len(self.prefix_returns)]
        if len(set(lengths)) > 1 or not lengths[0]:
            raise ValueError(
                "prefix_groups, prefix_fracs and prefix_returns: read"
                f" {lengths[0]}, {lengths[1]} and {lengths[2]} entries; expected equally many, at"
                " least one"
            )
        return self

    def refuse_misfits(self, sft: Sft, rl: Rl, learner: Learner) -> None:
        """Say what of it does not go with the other sections.

        Raises:
            ValueError: the first that does not.
        """
        try:
            traces = self.sft_of(sft)
        except ValidationError as error:
            raise ValueError(format_validation_error("cooperate.sft", error, Sft)) from error
        if traces.objective == "kl":
            raise ValueError(
                'cooperate.sft.objective: read "kl"; rollouts have no likeliest tokens of a'
                " behavior policy, expected another objective"
            )
        if traces.normalize == "per_batch" or traces.control == "mean_weight":
            raise ValueError(
                f"cooperate.sft: read normalize {traces.normalize!r} and control"
                f" {traces.control!r}; they would change the rollouts' gradient too, expected"
                " others"
            )
        if traces.negatives and (self.method == "trapo" or self.traces == "failed"):
            raise ValueError(
                "cooperate.sft.negatives: read true; a trace that is shown to the policy must be"
                " right, expected false"
            )
        if self.method == "trapo" and sum(self.prefix_groups) != rl.group_size:
            raise ValueError(
                f"cooperate.prefix_groups: read {list(self.prefix_groups)}, together"
                f" {sum(self.prefix_groups)}; expected rl.group_size, {rl.group_size}"
            )
        if self.method == "trapo" and rl.loss == "nft":
            raise ValueError(
                'cooperate.method: read "trapo" with rl.loss "nft", whose answers must all be the'
                " policy's own; expected another loss"
            )
        partitioned = self.method == "bridge" or self.frozen_frac > 0
        if partitioned and learner.zero_stage != 3:
            raise ValueError(
                f"learner.zero_stage: read {learner.zero_stage} with cooperate.method"
                f" {self.method!r}, which reaches for its own part of each gradient and parameter;"
                " expected 3"
            )
        if self.method == "bridge" and learner.lora is not None:
            raise ValueError(
                'learner.lora: read one with cooperate.method "bridge", which trains weights and'
                " the adapters of cooperate.lora; expected none"
            )
        fewest = learner.min_workers or learner.num_workers
        if self.method == "bridge" and fewest != learner.num_workers:
            raise ValueError(
                f'learner.min_workers: read {fewest} with cooperate.method "bridge", whose'
                " checkpoints are for one number of ranks; expected learner.num_workers,"
                f" {learner.num_workers}"
            )
