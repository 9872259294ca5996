"""What a job may say of training: the optimizer, stage `sft`, and the ranks that learn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pear_ray.config.base import Section

Schedule = Literal["cosine", "linear", "constant"]

# Each mean's decay.
Beta = Annotated[float, Field(ge=0, lt=1)]

CLIP_LOG_RATIO = {None: (-0.08, 0.3), "short_answers": (-0.5, 0.5)}


class Optimizer(Section):
    """AdamW and its learning rate, alike in every stage that trains."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up."""
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises to its peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay of the running means of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's term against division by zero."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which the gradient is scaled down."""


class Sft(Optimizer):
    objective: Literal["nll", "kl", "dft", "iw", "sed", "trsft"] = "nll"
    """The base objective, weighted or not: negative log-likelihood, distillation from the behavior
    policy's likeliest tokens (needs corpus.top_logprobs), DFT, iw-SFT, SED-SFT or TrSFT."""
    level: Literal["none", "token", "block", "sequence"] = "token"
    """PEAR's importance weights; "none" is plain SFT."""
    preset: Literal["short_answers"] | None = None
    """Settings for what the paper's do not fit. "short_answers": bounds of the log-ratio of
    [-0.5, 0.5], since the paper's leave the weights of answers of some ten tokens almost alike. Not
    the paper's method."""
    discount: float = Field(0.999, gt=0, le=1)
    """Discount of the weights per token of suffix."""
    block_size: int = Field(4, gt=0)
    """Tokens in a block, for level "block"."""
    clip_log_ratio: tuple[float, float] | None = None
    """Bounds of each token's log-ratio, in nats; without them the paper's [-0.08, 0.3], or those of
    the preset."""
    clip_log_weight: tuple[float, float] = (-10.0, 5.0)
    """Bounds of each token's log-weight, in nats."""
    normalize: Literal["none", "per_sequence", "per_batch"] = "none"
    """Whether weights are scaled to mean 1, within each sequence or over each step's tokens."""
    control: Literal["none", "mean_weight", "shuffled", "centered"] = "none"
    """What a comparison needs beside PEAR: every token the mean weight; the same weights dealt at
    random; each trace's mean log-ratio taken away."""
    sources: tuple[str, ...] = ()
    """Learn only from rows of these sources, and measure the held-out loss on theirs; none named:
    all."""
    negatives: bool = False
    """Push down traces with `correct` = false (this project's extension); without it they are left
    out."""
    negative_coefficient: float = Field(0.1, gt=0)
    """How much a negative trace's token counts, beside 1 for others."""
    trsft_alpha: float = Field(0.1, gt=0, le=1)
    """Probability above which TrSFT is plain."""
    sed_strength: float = Field(1.0, ge=0)
    """SED-SFT: factor of the term that keeps undecided places open."""
    sed_top_k: int = Field(10, gt=0)
    """SED-SFT: likeliest tokens whose probability tells whether a place is undecided."""
    sed_decided_frac: float = Field(0.7, gt=0, lt=1)
    """SED-SFT: share of the corpus's tokens that count as decided, by which the bound on that
    probability is chosen before training."""
    iw_temperature: float = Field(1.0, gt=0)
    """iw-SFT: factor of the mean log-ratio of a sequence."""
    iw_bounds: tuple[float, float] = (0.0, 16.0)
    """iw-SFT: bounds of a sequence's weight."""
    epochs: int = Field(1, gt=0)
    """Passes over the corpus."""
    examples_per_step: int = Field(64, gt=0)
    """Sequences in one optimizer step, over all ranks."""
    rows_per_window: int = Field(16384, gt=0)
    """Rows that are mixed in memory; row groups come in random order too."""
    eval_every: int = Field(50, gt=0)
    """Optimizer steps between two measurements of the held-out loss."""
    heldout_rows: int = Field(512, gt=0)
    """Held-out rows that are measured, at most."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate."""

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """`clip_log_ratio`, or what stands for it."""
        return self.clip_log_ratio or CLIP_LOG_RATIO[self.preset]

    @model_validator(mode="after")
    def _fits_together(self) -> Sft:
        for name in ("clip_log_ratio", "clip_log_weight", "iw_bounds"):
            low, high = getattr(self, name) or self.ratio_bounds
            if low >= high:
                raise ValueError(f"{name}: read {[low, high]}; expected the lower bound first")
        if self.level == "none":
            for name in ("normalize", "control"):
                if getattr(self, name) != "none":
                    raise ValueError(
                        f'{name}: read {getattr(self, name)!r} with level "none", which has no'
                        " weights; expected another level"
                    )
        if self.control != "none" and self.normalize != "none":
            raise ValueError(
                f"control and normalize: read {self.control!r} and {self.normalize!r}; expected one"
                ' of them to be "none"'
            )
        return self


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685), through peft."""

    rank: int = Field(16, gt=0)
    """Rank of each adapter."""
    alpha: int = Field(32, gt=0)
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are dropped in training."""
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """Names of the linear layers that get one."""


class Learner(Section):
    """DeepSpeed ranks under Ray Train."""

    num_workers: int = Field(2, gt=0)
    """Ranks over which parameters, gradients and optimizer states are partitioned."""
    min_workers: int | None = Field(None, gt=0)
    """Go on with fewer ranks, down to this number, while nodes are missing."""
    cpus_per_worker: float = Field(1.0, ge=0)
    """CPUs a rank reserves in Ray."""
    use_gpu: bool = False
    """One GPU per rank, NCCL; otherwise CPU threads and gloo."""
    tokens_per_micro_batch: int = Field(8192, gt=0)
    """Packed tokens in one forward and backward pass of one rank."""
    sequence_parallel: int = Field(1, gt=0)
    """Ranks that share each pack, for sequences longer than one rank can hold (DeepSpeed-Ulysses).
    A pack then has so many times `tokens_per_micro_batch`."""
    logits_mib: float = Field(512.0, gt=0)
    """Memory for logits and their softmax. Where a micro-batch's need more, they are made chunk by
    chunk, in the forward and again in the backward pass."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """What is partitioned over ranks: nothing, optimizer states, gradients too, parameters too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What a GPU leaves to the memory of its machine: optimizer states, or parameters too."""
    lora: Lora | None = None
    """Train low-rank adapters instead of the weights themselves."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, for less memory."""
    timeout_seconds: float = Field(600.0, gt=0)
    """Longest wait for room to start, for another rank, for rollouts or for a checkpoint."""
    max_failures: int = Field(2, ge=0)
    """How often Ray Train restarts the ranks after one of them died."""
    save_every: int = Field(50, gt=0)
    """Optimizer steps between two checkpoints from which a broken run goes on."""

    @property
    def tokens_per_pack(self) -> int:
        """Packed tokens of the ranks that share a pack."""
        return self.tokens_per_micro_batch * self.sequence_parallel

    @model_validator(mode="after")
    def _fits_together(self) -> Learner:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} is more than num_workers {self.num_workers}"
            )
        for name in ("num_workers", "min_workers"):
            if (getattr(self, name) or 0) % self.sequence_parallel:
                raise ValueError(
                    f"{name} {getattr(self, name)} cannot be dealt into groups of sequence_parallel"
                    f" {self.sequence_parallel}"
                )
        if self.sequence_parallel > 1 and self.min_workers not in (None, self.num_workers):
            raise ValueError(
                f"min_workers {self.min_workers}: ranks that share packs go together; expected"
                f" num_workers, {self.num_workers}"
            )
        if self.offload == "parameters" and self.zero_stage < 3:
            raise ValueError(
                f'offload "parameters" needs zero_stage 3, which partitions them; read'
                f" {self.zero_stage}"
            )
        if self.offload == "optimizer" and self.zero_stage < 1:
            raise ValueError('offload "optimizer" needs zero_stage 1 or more; read 0')
        return self
