"""Keys of stages `rl` and `cooperate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from pear_ray.config.base import Fraction, Section, by_type, describe, overridden
from pear_ray.config.engines import Learner, Lora
from pear_ray.config.sft import LearningRate, Optimizer, Schedule, Sft, Temperature
from pear_ray.errors import ConfigError, require

ClipRatio = Annotated[
    tuple[Fraction, Annotated[float, Field(ge=0)]],
    Field(description="[low, high]: the ratio to the sampling policy is clipped to [1 - low, 1 + high]."),
]


class PpoLoss(Section):
    """PPO's clipped ratio of each token."""

    type: Literal["ppo"] = "ppo"
    clip_ratio: ClipRatio = (0.2, 0.28)


class GspoLoss(Section):
    """GSPO: one clipped ratio per sequence."""

    type: Literal["gspo"] = "gspo"
    clip_ratio: ClipRatio = (3e-4, 4e-4)


class CispoLoss(Section):
    """CISPO: the clipped ratio weights the log-probability."""

    type: Literal["cispo"] = "cispo"
    clip_ratio: ClipRatio = (1.0, 3.0)


class NftLoss(Section):
    """NFT, which has its own advantages and clips nothing."""

    type: Literal["nft"] = "nft"


class RatioToSampler(Section):
    """Use the engine's log-probs as those of the old policy."""

    type: Literal["ratio"] = "ratio"


class TruncatedSampling(Section):
    """Weight each token by min(learner / engine probability, cap)."""

    type: Literal["truncated"] = "truncated"
    cap: float = Field(2.0, gt=0)
    """Largest weight of a token."""


class Rl(Optimizer):
    """Stage `rl`."""

    steps: int = Field(200, gt=0)
    """Optimizer steps; each trains on one batch of fresh rollouts."""
    prompts_per_step: int = Field(128, gt=0)
    """Prompts per step."""
    group_size: int = Field(8, gt=1)
    """Completions per prompt."""
    temperature: Temperature = 1.0
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """Advantages from the rewards of a group."""
    loss: Annotated[PpoLoss | GspoLoss | CispoLoss | NftLoss, Field(discriminator="type"), by_type("ppo")] = PpoLoss()
    """Policy loss."""
    importance_sampling: Annotated[
        RatioToSampler | TruncatedSampling, Field(discriminator="type"), by_type("ratio")
    ] = RatioToSampler()
    """Correction of the mismatch between the engine's log-probs and the learner's."""
    loss_agg: Literal["token", "sequence", "constant"] = "token"
    """Mean over tokens; mean over sequences of their tokens' means; or sum over tokens divided by the number of
    sequences times generator.max_new_tokens."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Coefficient of the KL divergence to the initial policy; above 0, engines of its own serve that policy."""
    dynamic_sampling: bool = False
    """Replace a group whose completions all have the same reward by another prompt (DAPO)."""
    mask_truncated: bool = False
    """Train on no token of a completion that was cut at max_new_tokens; its reward still counts in the group's mean."""
    overlong_buffer_tokens: int = Field(0, ge=0)
    """Lower the reward by up to 1 over this many tokens before max_new_tokens (DAPO); 0: never."""
    max_staleness: int = Field(0, ge=0)
    """Learner steps by which sampling may run ahead of training; 0 is on-policy."""
    eval_every: int = Field(0, ge=0)
    """Steps between evaluations on held-out problems with the settings of [evaluation]; the best checkpoint by pass@1
    is exported too. 0: no evaluation during training."""
    early_stopping_patience: int = Field(0, ge=0)
    """Stop after this many evaluations without a better pass@1; 0: never."""
    target_pass_rate: float | None = Field(None, gt=0, le=1)
    """Stop once an evaluation reaches this pass@1."""
    record: bool = False
    """Write every step's rollouts to RUN/rl/rollouts, as Parquet."""
    replay: str | None = None
    """Train on recorded rollouts of this folder, without engines."""
    learning_rate: LearningRate = 1e-6
    schedule: Schedule = "constant"

    def _check(self) -> None:
        buffer = self.overlong_buffer_tokens
        expected = '0 with loss "nft", whose rewards are 0 or 1'
        require(self.loss.type != "nft" or not buffer, "overlong_buffer_tokens", expected, buffer)
        for key, value in (("record", self.record), ("eval_every", self.eval_every)):
            require(self.replay is None or not value, key, "none with replay, which starts no engine", value)
        for key in ("early_stopping_patience", "target_pass_rate"):
            value = getattr(self, key)
            require(not value or self.eval_every, key, "none with eval_every 0", value)


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
    """Fraction of each parameter frozen in the step on traces: elements that the one on rollouts moved most (MIFO)."""


class BridgeMethod(Mixture):
    """BRIDGE: adapters beside the weights, and a shadow of both that sees RL alone."""

    type: Literal["bridge"] = "bridge"
    lora: Lora = Lora()
    """Adapters beside the weights."""
    lora_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the adapters; by default ten times that of the weights."""
    meta_objective: bool = True
    """Train the adapters on what the traces gain for RL; else they train as the weights do, without a shadow."""
    refresh_steps: int = Field(0, ge=0)
    """Steps after which the shadow's weights are reset to the policy's; 0: never."""
    shadow_offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep the shadow's optimizer states, or parameters too, in the memory of the GPU's host."""

    def _check(self) -> None:
        for key, default in (("refresh_steps", 0), ("shadow_offload", "none")):
            value = getattr(self, key)
            expected = f"{default!r} without meta_objective, which has the shadow"
            require(self.meta_objective or value == default, key, expected, repr(value))
        require(not self.lora.dropout, "lora.dropout", "0 beside trained weights", self.lora.dropout)


class TrapoMethod(Section):
    """TRAPO: completions continue prefixes of traces."""

    type: Literal["trapo"] = "trapo"
    prefix_groups: tuple[Annotated[int, Field(gt=0)], ...] = Field((4, 2, 1, 1), min_length=1)
    """Sizes of the chunks in which a prompt's completions are sampled, one after another."""
    prefix_fracs: tuple[Fraction, ...] = (0.0, 0.2, 0.5, 1.0)
    """Fraction of a trace that the completions of each chunk begin with."""
    prefix_returns: tuple[float, ...] = (-1.0, 0.5, 0.7, 0.9)
    """A chunk gets its prefix only if the mean reward of the prompt's earlier completions is lower than this."""

    def _check(self) -> None:
        num_chunks = len(self.prefix_groups)
        for key, values in (("prefix_fracs", self.prefix_fracs), ("prefix_returns", self.prefix_returns)):
            require(len(values) == num_chunks, key, f"{num_chunks} values, as in prefix_groups", len(values))


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

    def _check(self) -> None:
        fits = self.method.type != "trapo" or self.traces == "all"
        require(fits, "traces", '"all" with method "trapo"', repr(self.traces))
        fits = not self.failed_pass_rate or self.traces == "failed"
        require(fits, "failed_pass_rate", f"0 with traces {self.traces!r}", self.failed_pass_rate)
        for key in UNUSED_SFT_KEYS:
            expected = "none, since steps and optimizer are those of [rl]"
            require(key not in self.sft, f"sft.{key}", expected, repr(self.sft.get(key)))

    def check_job(self, sft: Sft, rl: Rl, learner: Learner) -> None:
        """Raise ConfigError if the section does not fit the other sections."""
        method = self.method
        try:
            traces = self.sft_of(sft)
        except ValidationError as error:
            raise ConfigError("\n".join(describe(error, Sft, "cooperate.sft"))) from error
        expected = "another objective, since rollouts have no top log-probs of a behavior policy"
        require(traces.objective.type != "kl", "cooperate.sft.objective", expected, '"kl"')
        expected = "another value, since this one would scale the rollouts' gradient too"
        for key, value in (("normalize", "per_batch"), ("control", "mean_weight")):
            require(getattr(traces, key) != value, f"cooperate.sft.{key}", expected, repr(value))
        must_be_correct = method.type == "trapo" or self.traces == "failed"
        expected = "false with method trapo or traces failed, whose traces must be correct"
        require(not (must_be_correct and traces.negatives), "cooperate.sft.negatives", expected, "true")
        named = f'cooperate.method "{method.type}"'
        if method.type == "trapo":
            sizes, expected = list(method.prefix_groups), f"a sum of rl.group_size {rl.group_size}"
            require(sum(sizes) == rl.group_size, "cooperate.method.prefix_groups", expected, sizes)
            expected = f"another loss with {named}, since NFT needs completions that the policy sampled in full"
            require(rl.loss.type != "nft", "rl.loss", expected, '"nft"')
        if method.type == "bridge" or (method.type == "alternate" and method.frozen_frac > 0):
            expected = f"3 with {named}, which works on partitioned gradients and parameters"
            require(learner.zero_stage == 3, "learner.zero_stage", expected, learner.zero_stage)
        if method.type == "bridge":
            expected = f"none with {named}, which trains the weights and the adapters of cooperate.method.lora"
            require(learner.lora is None, "learner.lora", expected, "one")
            fewest, most = learner.min_workers, learner.num_workers
            expected = f"learner.num_workers {most} with {named}, whose checkpoints fix the number of ranks"
            require(fewest == most, "learner.min_workers", expected, fewest)
