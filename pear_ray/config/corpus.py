"""Keys of the offline corpus."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pear_ray.config.base import Fraction, Section


class CorpusSample(Section):
    """Sample the corpus from the behavior policies, with their log-probs."""

    num_examples: dict[str, Annotated[int, Field(gt=0)]] = Field(min_length=1)
    """Correct completions to keep from each source of [behavior]."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
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

    @model_validator(mode="after")
    def _check_pair(self) -> Columns:
        for key, other in (("prompt", self.response), ("response", self.prompt)):
            if getattr(self, key) is None and other is not None:
                raise ValueError(f"{key}: expected both prompt and response or neither, got one")
        return self


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
    """Rows of each source that are scored in every way to compare: by the engine, by the trainer's forward pass, and as
    recorded."""
    max_logprob_gap: float = Field(0.1, gt=0)
    """`score` fails if two of these differ by more nats per token on average."""
    top_logprobs: int = Field(0, ge=0)
    """Likeliest tokens to keep with their log-probs at each position, for distillation."""
    rows_per_part: int = Field(512, gt=0)
    """Rows that are scored and stored together; a crash repeats at most this many per scorer."""

    @model_validator(mode="after")
    def _check_origin(self) -> Corpus:
        if self.path is not None and self.sample is not None:
            raise ValueError("path: expected either path or sample, got both")
        return self
