"""Keys of stage `sft`, and of the optimizer in every stage that trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pear_ray.config.base import Bounds, Section, by_type

Schedule = Literal["cosine", "linear", "constant"]
Beta = Annotated[float, Field(ge=0, lt=1)]

CLIP_LOG_RATIO = {None: (-0.08, 0.3), "short_answers": (-0.5, 0.5)}


class Optimizer(Section):
    """AdamW and its learning rate schedule."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up."""
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    """Fraction of the steps in which the learning rate rises to its peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates of the running means of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which the gradient is scaled down."""


class NllObjective(Section):
    """Negative log-likelihood."""

    type: Literal["nll"] = "nll"


class KlObjective(Section):
    """Distillation from the behavior policy's likeliest tokens; needs corpus.top_logprobs."""

    type: Literal["kl"] = "kl"


class DftObjective(Section):
    """DFT."""

    type: Literal["dft"] = "dft"


class IwObjective(Section):
    """iw-SFT: each sequence is weighted."""

    type: Literal["iw"] = "iw"
    temperature: float = Field(1.0, gt=0)
    """Factor of a sequence's mean log-ratio."""
    bounds: Bounds = (0.0, 16.0)
    """Bounds of a sequence's weight."""


class SedObjective(Section):
    """SED-SFT: an entropy term at undecided positions."""

    type: Literal["sed"] = "sed"
    strength: float = Field(1.0, ge=0)
    """Coefficient of the entropy term."""
    top_k: int = Field(10, gt=0)
    """Likeliest tokens whose probability mass decides whether a position is undecided."""
    decided_frac: float = Field(0.7, gt=0, lt=1)
    """Fraction of the corpus's tokens to count as decided; it fixes the bound on that mass before training."""


class TrSftObjective(Section):
    """TrSFT: a trust region on each token."""

    type: Literal["trsft"] = "trsft"
    alpha: float = Field(0.1, gt=0, le=1)
    """Probability above which TrSFT is plain negative log-likelihood."""


Objective = Annotated[
    NllObjective | KlObjective | DftObjective | IwObjective | SedObjective | TrSftObjective,
    Field(discriminator="type"),
    by_type("nll"),
]


class Sft(Optimizer):
    """Stage `sft`."""

    objective: Objective = NllObjective()
    """Base objective, with or without importance weights."""
    level: Literal["none", "token", "block", "sequence"] = "token"
    """Level of PEAR's importance weights; "none" is plain SFT."""
    preset: Literal["short_answers"] | None = None
    """"short_answers" sets clip_log_ratio to [-0.5, 0.5]: the paper's bounds leave the weights of answers of about ten
    tokens almost equal. An extension of the paper's method."""
    discount: float = Field(0.999, gt=0, le=1)
    """Discount of the weights per token of suffix."""
    block_size: int = Field(4, gt=0)
    """Tokens in a block, for level "block"."""
    clip_log_ratio: Bounds | None = None
    """Bounds of each token's log-ratio, in nats; by default the preset's, else the paper's [-0.08, 0.3]."""
    clip_log_weight: Bounds = (-10.0, 5.0)
    """Bounds of each token's log-weight, in nats."""
    normalize: Literal["none", "per_sequence", "per_batch"] = "none"
    """Scale the weights to mean 1 within each sequence, or over the tokens of each step."""
    control: Literal["none", "mean_weight", "shuffled", "centered"] = "none"
    """Control experiments for PEAR: give every token the mean weight; permute the weights; subtract each trace's mean
    log-ratio."""
    sources: tuple[str, ...] = ()
    """Train and measure the held-out loss only on rows of these sources; empty: all."""
    negatives: bool = False
    """Push down traces with `correct` = false (an extension); otherwise they are dropped."""
    negative_coefficient: float = Field(0.1, gt=0)
    """Coefficient of a negative trace's tokens, relative to 1 for the others."""
    epochs: int = Field(1, gt=0)
    """Passes over the corpus."""
    examples_per_step: int = Field(64, gt=0)
    """Sequences per optimizer step, over all ranks."""
    rows_per_window: int = Field(16384, gt=0)
    """Size of the shuffle buffer, in rows; row groups are read in random order."""
    eval_every: int = Field(50, gt=0)
    """Optimizer steps between measurements of the held-out loss."""
    heldout_rows: int = Field(512, gt=0)
    """Largest number of held-out rows to measure."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate."""

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """`clip_log_ratio`, or the bounds of the preset."""
        # Not a default: an arm may set a preset over the bounds of a resolved job.
        return self.clip_log_ratio or CLIP_LOG_RATIO[self.preset]

    @model_validator(mode="after")
    def _check_weights(self) -> Sft:
        for key in ("normalize", "control"):
            value = getattr(self, key)
            if self.level == "none" and value != "none":
                raise ValueError(f'{key}: expected "none" with level "none", got {value!r}')
        if self.control != "none" and self.normalize != "none":
            raise ValueError(f'normalize: expected "none" with control {self.control!r}, got {self.normalize!r}')
        return self
