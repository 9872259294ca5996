"""Keys of stage `rl`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pear_ray.config.base import Fraction, Section, by_type
from pear_ray.config.sft import Optimizer, Schedule

# The ratio to the sampling policy is clipped to [1 - low, 1 + high].
ClipRatio = tuple[Fraction, Annotated[float, Field(ge=0)]]


class PpoLoss(Section):
    """PPO's clipped ratio of each token."""

    type: Literal["ppo"] = "ppo"
    clip_ratio: ClipRatio = (0.2, 0.28)
    """[low, high]: the ratio to the sampling policy is clipped to [1 - low, 1 + high]."""


class GspoLoss(Section):
    """GSPO: one clipped ratio per sequence."""

    type: Literal["gspo"] = "gspo"
    clip_ratio: ClipRatio = (3e-4, 4e-4)
    """[low, high]: the ratio to the sampling policy is clipped to [1 - low, 1 + high]."""


class CispoLoss(Section):
    """CISPO: the clipped ratio weights the log-probability."""

    type: Literal["cispo"] = "cispo"
    clip_ratio: ClipRatio = (1.0, 3.0)
    """[low, high]: the ratio to the sampling policy is clipped to [1 - low, 1 + high]."""


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
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
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
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up."""

    @model_validator(mode="after")
    def _check_keys(self) -> Rl:
        if self.loss.type == "nft" and self.overlong_buffer_tokens:
            raise ValueError(
                'overlong_buffer_tokens: expected 0 with loss "nft", whose rewards are 0 or 1, got'
                f" {self.overlong_buffer_tokens}"
            )
        for key in ("record", "eval_every"):
            if self.replay is not None and getattr(self, key):
                raise ValueError(f"{key}: expected none with replay, which starts no engine, got {getattr(self, key)}")
        for key in ("early_stopping_patience", "target_pass_rate"):
            value = getattr(self, key)
            if value and not self.eval_every:
                raise ValueError(f"{key}: expected none with eval_every 0, got {value}")
        return self
