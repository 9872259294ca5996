"""Which offline traces a job has, and what becomes of rows that cannot be used as they are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pear_ray.config.base import Section


class CorpusSample(Section):
    """Makes the corpus by sampling the behavior policies, keeping the log-probs."""

    num_examples: dict[str, Annotated[int, Field(gt=0)]] = Field(min_length=1)
    """How many right answers to keep from each source of [behavior]."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    max_attempts_per_example: int = Field(20, gt=0)
    """Gives up, with an error, when so many answers were needed for each one kept."""


class Columns(Section):
    """What the corpus calls its columns; those that it does not have count as empty."""

    messages: str = "messages"
    """Conversation: a list of {role, content}, the last from the assistant."""
    prompt: str | None = None
    """Question, as text, where the corpus has two columns in place of `messages`."""
    response: str | None = None
    """Answer to it, as text."""
    example_id: str = "example_id"
    """Name of the row; one is made from the content of a row that has none."""
    source: str = "source"
    """Who wrote the row."""
    split: str = "split"
    """"train" or "heldout"; drawn by hash of the prompt where there is none."""
    correct: str = "correct"
    """Whether the answer is right."""
    response_ids: str = "response_ids"
    """Token ids of the response as its author sampled them."""
    behavior_logprobs: str = "behavior_logprobs"
    """Log-prob of each response token, as its author reported it."""

    @model_validator(mode="after")
    def _both_halves(self) -> Columns:
        if (self.prompt is None) != (self.response is None):
            raise ValueError("give prompt and response together, or neither and `messages`")
        return self


class Corpus(Section):
    path: str | None = None
    """Parquet or JSON lines (plain, .gz, .zst): a file, a folder or a pattern such as
    "data/*.jsonl.gz", on disk or at s3://, gs:// or hf://datasets/OWNER/NAME."""
    columns: Columns = Columns()
    """Names of the corpus' columns."""
    source: str | None = None
    """Source of the rows that name none."""
    fallback_scorer: str | None = None
    """Entry of [behavior] whose model scores rows of sources that have none of their own. Such
    rows are marked; without a reference they are rejected."""
    sample: CorpusSample | None = None
    """Sample the corpus from the policies of [behavior] instead of reading one."""
    scored_path: str | None = None
    """Folder of ScoredExample rows; without it, the `scored` folder of the run."""
    heldout_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the prompts held out by hash where the corpus has no `split` column."""
    max_rejected_fraction: float = Field(0.0, ge=0, le=1)
    """Stage `score` stops, with nothing written, when a larger share of the rows is unusable."""
    on_overlength: Literal["reject", "truncate"] = "reject"
    """What becomes of rows of more than generator.max_model_len tokens; "truncate" cuts the end of
    the response."""
    recorded_logprobs: Literal["probe", "ignore"] = "probe"
    """Log-probs that rows bring along are taken over once a probe confirms them, or ignored and
    computed anew."""
    probe_rows: int = Field(256, gt=0)
    """Rows of each source that are scored in every way there is: by the engine, by the trainer's
    forward pass, and as recorded."""
    max_logprob_gap: float = Field(0.1, gt=0)
    """Stage `score` stops when two of these differ by more nats per token on average."""
    top_logprobs: int = Field(0, ge=0)
    """Likeliest tokens whose log-probs are kept at each place besides the token's own, for
    distillation."""
    rows_per_part: int = Field(512, gt=0)
    """Rows that are scored and stored together: no more of them are scored twice after a crash."""

    @model_validator(mode="after")
    def _one_origin(self) -> Corpus:
        if self.path is not None and self.sample is not None:
            raise ValueError("give either path or sample, not both")
        return self
