"""Keys of stage `cooperate`, which trains on rollouts and on offline traces."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pear_ray.config.base import Fraction, Section, by_type, describe, overridden
from pear_ray.config.engines import Learner, Lora
from pear_ray.config.rl import Rl
from pear_ray.config.sft import Optimizer, Sft

# Keys of [sft] that have no meaning here: steps and optimizer are those of [rl].
UNUSED_SFT_KEYS = ("epochs", *Optimizer.model_fields)


class Mixture(Section):
    """Weights of the two signals in one loss."""

    rl_weight: Fraction = 0.5
    """Weight lambda of the rollouts in the loss; 1 is `rl`, 0 is `sft`."""
    rl_weight_final: Fraction = Field(default_factory=lambda data: data["rl_weight"])
    """lambda in the last step, interpolated linearly; by default `rl_weight`."""


class SumMethod(Mixture):
    """One loss of both signals."""

    type: Literal["sum"] = "sum"


class AlternateMethod(Section):
    """An optimizer step on rollouts, then one on traces."""

    type: Literal["alternate"] = "alternate"
    frozen_frac: float = Field(0.0, ge=0, lt=1)
    """Fraction of each parameter that the step on traces leaves alone: the elements that the step on rollouts moved
    most (MIFO)."""


class BridgeMethod(Mixture):
    """BRIDGE: adapters beside the weights, and a shadow of both that sees RL alone."""

    type: Literal["bridge"] = "bridge"
    lora: Lora = Lora()
    """Adapters beside the weights."""
    lora_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the adapters; by default ten times that of the weights."""
    meta_objective: bool = True
    """Train the adapters on what the traces gain for RL; otherwise they train as the weights do, and there is no
    shadow."""
    refresh_steps: int = Field(0, ge=0)
    """Steps after which the shadow's weights are reset to the policy's; 0: never."""
    shadow_offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep the shadow's optimizer states, or parameters too, in the memory of the GPU's host."""

    @model_validator(mode="after")
    def _check_shadow(self) -> BridgeMethod:
        for key in ("refresh_steps", "shadow_offload"):
            default, value = type(self).model_fields[key].default, getattr(self, key)
            if not self.meta_objective and value != default:
                raise ValueError(
                    f"{key}: expected {default!r} without meta_objective, which has the shadow, got {value!r}"
                )
        if self.lora.dropout:
            raise ValueError(f"lora.dropout: expected 0 beside trained weights, got {self.lora.dropout}")
        return self


class TrapoMethod(Section):
    """TRAPO: completions continue prefixes of traces."""

    type: Literal["trapo"] = "trapo"
    prefix_groups: tuple[Annotated[int, Field(gt=0)], ...] = Field((4, 2, 1, 1), min_length=1)
    """Sizes of the chunks in which a prompt's completions are sampled, one after another."""
    prefix_fracs: tuple[Fraction, ...] = (0.0, 0.2, 0.5, 1.0)
    """Fraction of a trace that the completions of each chunk begin with."""
    prefix_returns: tuple[float, ...] = (-1.0, 0.5, 0.7, 0.9)
    """A chunk gets its prefix only if the mean reward of the prompt's earlier completions is lower than this."""

    @model_validator(mode="after")
    def _check_lengths(self) -> TrapoMethod:
        for key in ("prefix_fracs", "prefix_returns"):
            if len(getattr(self, key)) != len(self.prefix_groups):
                raise ValueError(
                    f"{key}: expected {len(self.prefix_groups)} values, as in prefix_groups, got"
                    f" {len(getattr(self, key))}"
                )
        return self


class Cooperate(Section):
    """Stage `cooperate`. Rollouts, steps and optimizer are those of [rl], traces those of [sft]."""

    method: Annotated[
        SumMethod | AlternateMethod | BridgeMethod | TrapoMethod, Field(discriminator="type"), by_type("sum")
    ] = SumMethod()
    """How a step uses both signals."""
    traces: Literal["all", "failed"] = "all"
    """Traces of a step: the next rows of the corpus, or those of the prompts that its own rollouts failed (MIFO). With
    method "trapo" only "all"."""
    failed_pass_rate: float = Field(0.0, ge=0, lt=1)
    """A prompt has failed if at most this fraction of its completions is correct."""
    entropy_top_frac: float = Field(1.0, gt=0, le=1)
    """Fraction of each trace's tokens to train on, those of the highest entropy (MIFO)."""
    sft: dict[str, Any] = Field({})
    """Keys of [sft] that differ here. Method "trapo" has objective "trsft" unless it is set here."""

    def sft_of(self, sft: Sft) -> Sft:
        """Return the settings for traces in a job with this [sft]."""
        if self.method.type == "trapo":
            sft = Sft(**overridden(sft, {"objective": "trsft"}))
        return Sft(**overridden(sft, self.sft))

    @model_validator(mode="after")
    def _check_keys(self) -> Cooperate:
        if self.method.type == "trapo" and self.traces != "all":
            raise ValueError(f'traces: expected "all" with method "trapo", got {self.traces!r}')
        if self.failed_pass_rate and self.traces != "failed":
            raise ValueError(f"failed_pass_rate: expected 0 with traces {self.traces!r}, got {self.failed_pass_rate}")
        for key in UNUSED_SFT_KEYS:
            if key in self.sft:
                raise ValueError(
                    f"sft.{key}: expected none, since steps and optimizer are those of [rl], got {self.sft[key]!r}"
                )
        return self

    def check_job(self, sft: Sft, rl: Rl, learner: Learner) -> None:
        """Raise ValueError if the section does not fit the other sections."""
        method = self.method
        try:
            traces = self.sft_of(sft)
        except ValidationError as error:
            raise ValueError("\n".join(describe(error, Sft, "cooperate.sft"))) from error
        if traces.objective.type == "kl":
            raise ValueError(
                "cooperate.sft.objective: expected another objective, since rollouts have no"
                ' top log-probs of a behavior policy, got "kl"'
            )
        for key, value in (("normalize", "per_batch"), ("control", "mean_weight")):
            if getattr(traces, key) == value:
                raise ValueError(
                    f"cooperate.sft.{key}: expected another value, since this one would scale the"
                    f" rollouts' gradient too, got {value!r}"
                )
        if traces.negatives and (method.type == "trapo" or self.traces == "failed"):
            raise ValueError(
                "cooperate.sft.negatives: expected false with method trapo or traces failed, whose"
                " traces must be correct, got true"
            )
        if method.type == "trapo" and sum(method.prefix_groups) != rl.group_size:
            raise ValueError(
                f"cooperate.method.prefix_groups: expected a sum of rl.group_size {rl.group_size},"
                f" got {list(method.prefix_groups)}"
            )
        if method.type == "trapo" and rl.loss.type == "nft":
            raise ValueError(
                'rl.loss: expected another loss with cooperate.method "trapo", since NFT needs'
                ' completions that the policy sampled in full, got "nft"'
            )
        freezes = method.type == "alternate" and method.frozen_frac > 0
        if (method.type == "bridge" or freezes) and learner.zero_stage != 3:
            raise ValueError(
                f'learner.zero_stage: expected 3 with cooperate.method "{method.type}", which works'
                f" on partitioned gradients and parameters, got {learner.zero_stage}"
            )
        if method.type == "bridge" and learner.lora is not None:
            raise ValueError(
                'learner.lora: expected none with cooperate.method "bridge", which trains the'
                " weights and the adapters of cooperate.method.lora, got one"
            )
        if method.type == "bridge" and learner.min_workers != learner.num_workers:
            raise ValueError(
                f"learner.min_workers: expected learner.num_workers {learner.num_workers} with"
                ' cooperate.method "bridge", whose checkpoints fix the number of ranks, got'
                f" {learner.min_workers}"
            )
