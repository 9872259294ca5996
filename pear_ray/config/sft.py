"""Keys of the offline corpus and of stage `sft`, and of the optimizer in every stage that trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pear_ray.config.base import Bounds, Fraction, Section, by_type
from pear_ray.errors import require

Temperature = Annotated[float, Field(gt=0, description="Sampling temperature.")]
LearningRate = Annotated[float, Field(gt=0, description="Peak learning rate.")]
Schedule = Annotated[Literal["cosine", "linear", "constant"], Field(description="Learning rate after the warm-up.")]
Beta = Annotated[float, Field(ge=0, lt=1)]

CLIP_LOG_RATIO = {None: (-0.08, 0.3), "short_answers": (-0.5, 0.5)}


class CorpusSample(Section):
    """Sample the corpus from the behavior policies, with their log-probs."""

    num_examples: dict[str, Annotated[int, Field(gt=0)]] = Field(min_length=1)
    """Correct completions to keep from each source of [behavior]."""
    temperature: Temperature = 1.0
    max_attempts_per_example: int = Field(20, gt=0)
    """Fail after this many completions per example to keep."""


class Columns(Section):
    """Column names of the corpus; missing columns count as empty."""

    messages: str = "messages"
    """Conversation: a list of {role, content}, the last from the assistant."""
    prompt: str | None = None
    """Question as text, if the corpus has two columns instead of `messages`."""
    response: str | None = None
    """Answer to `prompt`, as text."""
    example_id: str = "example_id"
    """Name of the row; by default a hash of its content."""
    source: str = "source"
    """Author of the row: an entry of [behavior]."""
    split: str = "split"
    """"train" or "heldout"; by default drawn by a hash of the prompt."""
    correct: str = "correct"
    """Whether the answer is correct."""
    response_ids: str = "response_ids"
    """Token ids of the response as its author sampled them."""
    behavior_logprobs: str = "behavior_logprobs"
    """Log-prob of each response token as its author recorded it."""

    def _check(self) -> None:
        for key, name, other in (("prompt", self.prompt, self.response), ("response", self.response, self.prompt)):
            require(name is not None or other is None, key, "both prompt and response or neither", "one")


class Corpus(Section):
    """The offline traces."""

    path: str | None = None
    """Parquet or JSON lines (plain, .gz, .zst): a file, a folder or a pattern such as "data/*.jsonl.gz", on disk or at
    s3://, gs:// or hf://datasets/OWNER/NAME."""
    columns: Columns = Columns()
    """Column names of the corpus."""
    source: str | None = None
    """Source of rows without one."""
    fallback_scorer: str | None = None
    """Entry of [behavior] whose model scores rows of sources that are not in [behavior]; such rows are marked. Without
    it they are rejected."""
    sample: CorpusSample | None = None
    """Sample the corpus from the policies of [behavior] instead of reading one."""
    scored_path: str | None = None
    """Folder of ScoredExample rows; by default the `scored` folder of the run."""
    heldout_fraction: float = Field(0.05, ge=0, lt=1)
    """Fraction of the prompts held out by hash if the corpus has no `split` column."""
    max_rejected_fraction: Fraction = 0.0
    """`score` fails, and writes nothing, if it must reject a larger fraction of the rows."""
    on_overlength: Literal["reject", "truncate"] = "reject"
    """Reject rows of more than generator.max_model_len tokens, or cut the end of the response."""
    recorded_logprobs: Literal["probe", "ignore"] = "probe"
    """Use the log-probs in the rows if a sample of them agrees with the engine's, or always compute them anew."""
    probe_rows: int = Field(256, gt=0)
    """Rows of each source to score in every way and compare: by the engine, by the trainer, and as recorded."""
    max_logprob_gap: float = Field(0.1, gt=0)
    """`score` fails if two of these differ by more nats per token on average."""
    top_logprobs: int = Field(0, ge=0)
    """Likeliest tokens to keep with their log-probs at each position, for distillation."""
    rows_per_part: int = Field(512, gt=0)
    """Rows that are scored and stored together; a crash repeats at most this many per scorer."""

    def _check(self) -> None:
        require(self.path is None or self.sample is None, "path", "either path or sample", "both")


class Optimizer(Section):
    """AdamW and its learning rate schedule."""

    learning_rate: LearningRate
    schedule: Schedule = "cosine"
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
    """Control experiments for PEAR: mean weight everywhere; weights permuted; minus each trace's mean log-ratio."""
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
    learning_rate: LearningRate = 1e-5

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """`clip_log_ratio`, or the bounds of the preset."""
        # Not a default: an arm may set a preset over the bounds of a resolved job.
        return self.clip_log_ratio or CLIP_LOG_RATIO[self.preset]

    def _check(self) -> None:
        for key, value in (("normalize", self.normalize), ("control", self.control)):
            require(self.level != "none" or value == "none", key, '"none" with level "none"', repr(value))
        expected = f'"none" with control {self.control!r}'
        require("none" in (self.control, self.normalize), "normalize", expected, repr(self.normalize))
