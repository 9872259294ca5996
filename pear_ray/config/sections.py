"""What a job may say. One frozen section per part of the job, one docstring per field.

A job is a TOML file; `--section.key value` on the command line overrides it. Paths in a job are
relative to the folder in which the command is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pear_ray.config.corpus import Corpus
from pear_ray.config.mistakes import describe
from pear_ray.config.section import Section
from pear_ray.config.training import Learner, Optimiser, Schedule, Sft


class Run(Section):
    dir: str
    """Run folder: everything the job writes. Made if absent."""
    seed: int = 0
    """Seed of everything random in the job: order of data, sampling, problems."""
    wait_seconds: float = Field(3600.0, gt=0)
    """How long to wait for another process that is working in the same run folder."""


class Pretrain(Section):
    """Makes a small Qwen3 from nothing, on demonstrations which the job's first task writes."""

    styles: dict[str, float]
    """Weight of each demonstration style of the task."""
    solved_fraction: float = Field(1.0, ge=0, le=1)
    """Share of the demonstrations that reach the right answer; the others are legal play."""
    steps: int = Field(600, gt=0)
    """Optimiser steps."""
    examples_per_step: int = Field(128, gt=0)
    """Demonstrations in one step."""
    learning_rate: float = Field(3e-3, gt=0)
    """Peak of the cosine schedule."""
    seed: int = 0
    """Seed of the initial weights and of the demonstrations."""
    start_from: str | None = None
    """Begin with the weights of another model of the job: "base", or a source of [behaviour]."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""
    hidden_size: int = Field(128, gt=0)
    """Width of the network."""
    intermediate_size: int = Field(256, gt=0)
    """Width of the feed-forward layers."""
    num_layers: int = Field(3, gt=0)
    """Decoder layers."""
    num_heads: int = Field(2, gt=0)
    """Attention heads, as many key-value heads; the head size is 64."""
    tie_word_embeddings: bool = False
    """Whether the output head is the input embedding."""
    deadline_seconds: float = Field(3600.0, gt=0)
    """Longest wait for this model, and for the one it starts from."""


class ModelSource(Section):
    path: str | None = None
    """Hugging Face folder or hub name."""
    pretrain: Pretrain | None = None
    """How to make the model when there is none to download."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSource:
        if (self.path is None) == (self.pretrain is None):
            raise ValueError("give either path (a folder or a hub name) or pretrain, not both")
        return self


class Model(ModelSource):
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision in which weights are trained and served. CPUs want float32."""


class Rl(Optimiser):
    steps: int = Field(200, gt=0)
    """Optimiser steps; each learns from one batch of fresh rollouts."""
    problems_per_step: int = Field(128, gt=0)
    """Problems in one step."""
    group_size: int = Field(8, gt=1)
    """Answers to each problem."""
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """How the rewards of a group become advantages."""
    clip_ratio: tuple[float, float] = (0.2, 0.28)
    """The ratio to the sampling policy is clipped to [1 - low, 1 + high]."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    max_staleness: int = Field(0, ge=0)
    """Learner steps by which sampling may run ahead of learning; 0 is on-policy."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up."""


class Generator(Section):
    """vLLM engines, for sampling, scoring and evaluation alike."""

    replicas: int = Field(1, gt=0)
    """Engines; `score` starts more of them, up to this number, as work waits."""
    min_replicas: int = Field(1, gt=0)
    """Engines that `score` starts with and keeps."""
    tensor_parallel: int = Field(1, gt=0)
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
    max_concurrent: int = Field(256, gt=0)
    """Requests an engine works on at once."""
    tokens_per_batch: int | None = Field(None, gt=0)
    """Tokens an engine reads in one forward pass; longer prompts are read in chunks. Without it
    8192 on GPUs and 2048 on CPUs."""
    memory_fraction: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that an engine may take."""
    kv_cache_gib: int = Field(1, gt=0)
    """Memory for the key-value cache of an engine that runs on CPUs."""
    deadline_seconds: float = Field(600.0, gt=0)
    """Longest wait for an engine to start, or to finish one batch of work."""

    @property
    def batch_tokens(self) -> int:
        """`tokens_per_batch`, or what stands for it."""
        return self.tokens_per_batch or (8192 if self.num_gpus > 0 else 2048)

    @property
    def num_actor_gpus(self) -> float:
        """GPUs of the actor itself: under tensor parallelism vLLM's own Ray workers hold them."""
        return self.num_gpus if self.tensor_parallel == 1 else 0.0

    @model_validator(mode="after")
    def _room_for_a_prompt(self) -> Generator:
        if self.max_new_tokens >= self.max_model_len:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt in"
                f" max_model_len {self.max_model_len}"
            )
        if self.batch_tokens < self.max_concurrent:
            raise ValueError(
                f"tokens_per_batch {self.batch_tokens} is less than max_concurrent"
                f" {self.max_concurrent}: each request has a token in each batch"
            )
        if self.min_replicas > self.replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is more than replicas {self.replicas}"
            )
        return self


class Weights(Section):
    """From learners to generators, through the object store."""

    bucket_mib: int = Field(512, gt=0)
    """Size of one object in the store; a rank's share of the model is cut into such buckets."""
    deadline_seconds: float = Field(300.0, gt=0)
    """Longest wait for a version."""
    max_probe_gap: float = Field(0.1, gt=0)
    """Stage `rl` stops when generator and learner disagree by more nats on the probe."""


class Evaluation(Section):
    num_problems: int = Field(256, gt=0)
    """Held-out problems of each task."""
    samples_per_problem: int = Field(16, gt=0)
    """Answers to each problem."""
    ks: tuple[int, ...] = Field((1, 8), min_length=1)
    """k of the reported pass@k."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    checkpoints: dict[str, str] = Field({})
    """Further models to evaluate beside those of this run: name and Hugging Face folder."""

    @model_validator(mode="after")
    def _enough_samples(self) -> Evaluation:
        for k in self.ks:
            if not 1 <= k <= self.samples_per_problem:
                raise ValueError(
                    f"ks holds {k}, which must lie between 1 and samples_per_problem"
                    f" {self.samples_per_problem}"
                )
        return self


class Tracking(Section):
    tensorboard: bool = False
    """Also write TensorBoard events to RUN/tensorboard."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""


class TaskSpec(Section):
    name: Literal["countdown", "reasoning_gym"]
    """Which family of problems."""
    options: dict[str, Any] = Field({})
    """The family's own options."""


class Arm(Section):
    """One way through `sft` and `rl`; arms share everything else."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Folder and label of the arm."""
    sft: dict[str, Any] = Field({})
    """Keys of [sft] which this arm sets differently."""
    rl: dict[str, Any] = Field({})
    """Keys of [rl] which this arm sets differently."""


class Job(Section):
    run: Run
    """Where the run lives, and its seed."""
    model: Model
    """The policy to be trained."""
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    """Problems for `sample`, `rl` and `evaluate`."""
    corpus: Corpus = Corpus()
    """The offline traces."""
    behaviour: dict[str, ModelSource] = Field({})
    """The model that wrote the rows of each `source`."""
    sft: Sft = Sft()
    """Stage `sft`."""
    rl: Rl = Rl()
    """Stage `rl`."""
    generator: Generator
    """The vLLM engines."""
    learner: Learner = Learner()
    """The DeepSpeed ranks."""
    weights: Weights = Weights()
    """Weight hand-over."""
    evaluation: Evaluation = Evaluation()
    """Stage `evaluate`."""
    tracking: Tracking = Tracking()
    """Where numbers go besides metrics.jsonl."""
    arms: tuple[Arm, ...] = ()
    """Arms of stage `pipeline`; without any, the job itself is the only one."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Job:
        if self.learner.tokens_per_pack < self.generator.max_model_len:
            raise ValueError(
                f"learner.tokens_per_micro_batch {self.learner.tokens_per_micro_batch} (shared by"
                f" {self.learner.sequence_parallel}) cannot hold"
                f" one sequence of generator.max_model_len {self.generator.max_model_len} tokens"
            )
        for field in ("source", "reference"):
            named = getattr(self.corpus, field)
            # The job of an arm has no behaviour models: its corpus is scored already.
            if named is not None and self.behaviour and named not in self.behaviour:
                raise ValueError(
                    f"corpus.{field}: read {named!r}, expected one of [behaviour]:"
                    f" {sorted(self.behaviour)}"
                )
        if self.corpus.sample is not None:
            for source in self.corpus.sample.num_examples:
                if source not in self.behaviour:
                    raise ValueError(
                        f"corpus.sample.num_examples names source {source!r}, expected one of"
                        f" [behaviour]: {sorted(self.behaviour)}"
                    )
        made = {"base": self.model, **self.behaviour}
        for source, origin in made.items():
            start = origin.pretrain.start_from if origin.pretrain else None
            parent = made[start].pretrain if start in made else None
            if start is not None and (parent is None or parent.start_from is not None):
                raise ValueError(
                    f"start_from of {source!r}: read {start!r}; expected a model with `pretrain`"
                    " and without a start_from of its own"
                )
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arms: each name once, read {names}")
        for arm in self.arms:
            for key, section, changed in (("sft", self.sft, arm.sft), ("rl", self.rl, arm.rl)):
                try:
                    type(section)(**{**section.model_dump(), **changed})
                except ValidationError as error:
                    where = f"arms.{arm.name}.{key}"
                    raise ValueError(describe(where, error, type(section))) from error
        return self

    @model_validator(mode="after")
    def _distillation_has_a_teacher(self) -> Job:
        objectives = {"sft": self.sft.objective} | {
            f"arms.{arm.name}.sft": arm.sft.get("objective") for arm in self.arms
        }
        distilled = [where for where, objective in objectives.items() if objective == "kl"]
        # A corpus that was scored before brings what it has, and the stage looks.
        if distilled and self.corpus.scored_path is None and not self.corpus.top_logprobs:
            raise ValueError(
                f'{distilled[0]}.objective: read "kl", which needs likeliest tokens of'
                " the behaviour policy, and corpus.top_logprobs 0; expected at least 1"
            )
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.dir)

    def model_path(self, source: str | None = None) -> str:
        """Folder or hub name of the model to be trained, or of the behaviour model of `source`."""
        origin = self.model if source is None else self.behaviour[source]
        if origin.path is not None:
            return origin.path
        return str((self.folder / "pretrain" / (source or "base")).absolute())

    @property
    def scored_folder(self) -> Path:
        """Where the ScoredExample rows are."""
        return Path(self.corpus.scored_path) if self.corpus.scored_path else self.folder / "scored"

    def of_arm(self, arm: Arm) -> Job:
        """The job of one arm: its own run folder below this one's, on this one's scored corpus."""
        document = self.model_dump()
        document["run"]["dir"] = str(self.folder / "arms" / arm.name)
        document["model"] = {"path": self.model_path(), "dtype": self.model.dtype}
        document["behaviour"] = {}
        document["corpus"] |= {"sample": None, "path": None}
        document["corpus"]["scored_path"] = str(self.scored_folder.absolute())
        document["sft"] |= arm.sft
        document["rl"] |= arm.rl
        document["arms"] = ()
        return Job(**document)
