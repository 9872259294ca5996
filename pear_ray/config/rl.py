"""What a job may say of reinforcement learning, of the engines that sample and score, and of how
weights reach them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pear_ray.config.base import Section
from pear_ray.config.sft import Optimizer, Schedule

CLIP_RATIO = {"ppo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 3.0)}


class Rl(Optimizer):
    steps: int = Field(200, gt=0)
    """Optimizer steps; each learns from one batch of fresh rollouts."""
    prompts_per_step: int = Field(128, gt=0)
    """Problems in one step."""
    group_size: int = Field(8, gt=1)
    """Answers to each problem."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """How the rewards of a group become advantages; loss "nft" has its own."""
    loss: Literal["ppo", "gspo", "cispo", "nft"] = "ppo"
    """What is minimized for each token."""
    clip_ratio: tuple[float, float] | None = None
    """The ratio to the sampling policy is clipped to [1 - low, 1 + high]. Without it the usual
    bounds of the loss: 0.2 and 0.28 for ppo, 3e-4 and 4e-4 for gspo, 1 and 3 for cispo."""
    importance_sampling: Literal["ratio", "truncated"] = "ratio"
    """What is done where the sampling engine's log-probs are not the learner's: they are the
    denominator of the ratio, or each token's loss is multiplied by their ratio, up to
    `is_cap` (truncated importance sampling)."""
    is_cap: float | None = Field(None, gt=0)
    """Largest weight of a token under `importance_sampling = "truncated"`; without it 2."""
    loss_agg: Literal["token", "sequence", "constant"] = "token"
    """Mean over tokens, over sequences of their tokens' means, or the sum over tokens divided by
    sequences times generator.max_new_tokens."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the policy that RL starts from, which engines of its own
    serve where this is above 0."""
    dynamic_sampling: bool = False
    """Dynamic sampling: a group whose answers all earn the same is replaced by another problem."""
    overlong: Literal["keep", "mask"] = "keep"
    """Whether answers that were cut at max_new_tokens are learned from; masked ones only count
    towards their group's mean."""
    overlong_buffer_tokens: int = Field(0, ge=0)
    """The last so many tokens before max_new_tokens lower the reward, by up to 1; 0: none do."""
    max_staleness: int = Field(0, ge=0)
    """Learner steps by which sampling may run ahead of learning; 0 is on-policy."""
    eval_every: int = Field(0, ge=0)
    """Steps between evaluations on held-out problems, with the settings of [evaluation]; 0: none
    on the way. The best checkpoint by pass@1 is exported as well."""
    early_stopping_patience: int = Field(0, ge=0)
    """Evaluations in a row without a better pass@1 after which the run ends; 0: it does not."""
    target_pass_rate: float | None = Field(None, gt=0, le=1)
    """Evaluated pass@1 at which the run ends."""
    record: bool = False
    """Keep every step's rollouts, as Parquet below RUN/rl/rollouts."""
    replay: str | None = None
    """Learn from a folder of recorded rollouts; no engine is started."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up."""

    @property
    def clip(self) -> tuple[float, float]:
        """`clip_ratio`, or what stands for it."""
        return self.clip_ratio or CLIP_RATIO[self.loss]

    @property
    def largest_weight(self) -> float:
        """`is_cap`, or what stands for it."""
        return self.is_cap or 2.0

    @model_validator(mode="after")
    def _keys_agree(self) -> Rl:
        if self.clip_ratio is not None:
            if self.loss == "nft":
                raise ValueError('clip_ratio: loss "nft" clips nothing; expected none')
            low, high = self.clip_ratio
            if not (0 <= low <= 1 and high >= 0):
                raise ValueError(
                    f"clip_ratio: read {list(self.clip_ratio)}; expected low from 0 to 1 and high"
                    " of at least 0"
                )
        if self.loss == "nft" and self.overlong_buffer_tokens:
            raise ValueError(
                f'overlong_buffer_tokens: read {self.overlong_buffer_tokens}; loss "nft" wants'
                " rewards of 0 and 1, expected 0"
            )
        if self.is_cap is not None and self.importance_sampling != "truncated":
            raise ValueError(
                f"is_cap: read {self.is_cap} with importance_sampling {self.importance_sampling!r};"
                ' expected "truncated"'
            )
        for key in ("record", "eval_every"):
            if self.replay is not None and getattr(self, key):
                raise ValueError(
                    f"{key}: read {getattr(self, key)}, and replay {self.replay!r}, which starts"
                    " no engine; expected one of them"
                )
        for key in ("early_stopping_patience", "target_pass_rate"):
            if getattr(self, key) and not self.eval_every:
                raise ValueError(
                    f"{key}: read {getattr(self, key)}, and eval_every 0; expected"
                    " evaluations that it can look at"
                )
        return self


class Generator(Section):
    """vLLM engines, for sampling, scoring and evaluation alike."""

    num_engines: int = Field(1, gt=0)
    """Engines at most: `score`, `rl` and `cooperate` start more of them as work waits."""
    min_engines: int | None = Field(None, gt=0)
    """Engines that they start with and keep. Without it `num_engines`."""
    tensor_parallel_size: int = Field(1, gt=0)
    """GPUs (or CPU processes) that share one engine."""
    num_cpus: float = Field(1.0, ge=0)
    """CPUs an engine reserves in Ray."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs an engine reserves in Ray."""
    threads: int = Field(1, gt=0)
    """Compute threads of an engine that runs on CPUs."""
    max_new_tokens: int = Field(gt=0)
    """Longest answer, in tokens."""
    max_model_len: int = Field(gt=0)
    """Longest prompt and answer together, in tokens."""
    max_num_seqs: int = Field(256, gt=0)
    """Requests an engine works on at once."""
    max_num_batched_tokens: int | None = Field(None, gt=0)
    """Tokens an engine reads in one forward pass; longer prompts are read in chunks. Without it
    8192 on GPUs and 2048 on CPUs."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that an engine may take."""
    kv_cache_gib: int = Field(1, gt=0)
    """Memory for the key-value cache of an engine that runs on CPUs."""
    metrics: bool = True
    """What vLLM says of itself (requests, tokens, cache) at Ray's Prometheus endpoint."""
    timeout_seconds: float = Field(600.0, gt=0)
    """Longest wait for an engine to start, or to finish one batch of work."""

    @property
    def batch_tokens(self) -> int:
        """`max_num_batched_tokens`, or what stands for it."""
        return self.max_num_batched_tokens or (8192 if self.num_gpus > 0 else 2048)

    @property
    def fewest_engines(self) -> int:
        """`min_engines`, or what stands for it."""
        return self.min_engines or self.num_engines

    @property
    def num_actor_gpus(self) -> float:
        """GPUs of the actor itself: under tensor parallelizm vLLM's own Ray workers hold them."""
        return self.num_gpus if self.tensor_parallel_size == 1 else 0.0

    @model_validator(mode="after")
    def _room_for_a_prompt(self) -> Generator:
        if self.max_new_tokens >= self.max_model_len:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt in"
                f" max_model_len {self.max_model_len}"
            )
        if self.batch_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.batch_tokens} is less than max_num_seqs"
                f" {self.max_num_seqs}: each request has a token in each batch"
            )
        if self.fewest_engines > self.num_engines:
            raise ValueError(
                f"min_engines {self.min_engines} is more than num_engines {self.num_engines}"
            )
        return self


class Weights(Section):
    """From learners to generators, through the object store."""

    bucket_mib: int = Field(512, gt=0)
    """Size of one object in the store; a rank's share of the model is cut into such buckets."""
    timeout_seconds: float = Field(300.0, gt=0)
    """Longest wait for a version."""
    full_every: int = Field(8, gt=0)
    """Of so many versions one travels whole, the others as what changed, where that is less than
    half; 1: all travel whole."""
    max_logprob_gap: float = Field(0.1, gt=0)
    """Stage `rl` stops when generator and learner disagree by more nats on the probe."""
