"""A job: one frozen section per table, one docstring per key.

A job is a TOML file; `--section.key value` on the command line overrides it. Paths in a job are relative to the working
directory of the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pear_ray.config.arms import Arm, Study, last_stage_with
from pear_ray.config.base import Section, describe, overridden
from pear_ray.config.cooperate import Cooperate
from pear_ray.config.corpus import Corpus
from pear_ray.config.engines import Generator, Learner, Placement, Rewards, Weights
from pear_ray.config.rl import Rl
from pear_ray.config.sft import Sft


class Run(Section):
    """The run directory and the seed."""

    dir: str
    """Run directory, for everything the job writes; created if missing."""
    seed: int = 0
    """Seed of everything random: data order, sampling, problems."""
    wait_seconds: float = Field(3600.0, gt=0)
    """Longest wait for another process that works in the same run directory."""


class Pretrain(Section):
    """Train a small Qwen3 from scratch, on demonstrations written by the job's first task."""

    styles: dict[str, float]
    """Weight of each demonstration style of the task."""
    solved_fraction: float = Field(1.0, ge=0, le=1)
    """Fraction of the demonstrations that reach the correct answer; the others are legal play."""
    steps: int = Field(600, gt=0)
    """Optimizer steps."""
    examples_per_step: int = Field(128, gt=0)
    """Demonstrations per step."""
    learning_rate: float = Field(3e-3, gt=0)
    """Peak of the cosine schedule."""
    seed: int = 0
    """Seed of the initial weights and of the demonstrations."""
    start_from: str | None = None
    """Start from the weights of another model of the job: "base", or a source of [behavior]."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""
    hidden_size: int = Field(128, gt=0)
    """Hidden size."""
    intermediate_size: int = Field(256, gt=0)
    """Hidden size of the feed-forward layers."""
    num_layers: int = Field(3, gt=0)
    """Decoder layers."""
    num_heads: int = Field(2, gt=0)
    """Attention heads and key-value heads; the head size is 64."""
    tie_word_embeddings: bool = False
    """Share the output head with the input embedding."""
    timeout_seconds: float = Field(3600.0, gt=0)
    """Longest wait for this model, and for the one it starts from."""


class ModelSource(Section):
    """A model: a folder, a hub name, or one to train from scratch."""

    path: str | None = None
    """Hugging Face folder or hub name."""
    pretrain: Pretrain | None = None
    """Train the model from scratch instead."""

    @model_validator(mode="after")
    def _check_origin(self) -> ModelSource:
        if (self.path is None) == (self.pretrain is None):
            got = "neither" if self.path is None else "both"
            raise ValueError(f"path: expected either path or pretrain, got {got}")
        return self


class Model(ModelSource):
    """The policy to train."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the weights in training and serving; use float32 on CPUs."""


class Evaluation(Section):
    """Stage `evaluate`."""

    num_problems: int = Field(256, gt=0)
    """Held-out problems of each task."""
    samples_per_problem: int = Field(16, gt=0)
    """Completions per problem."""
    ks: tuple[Annotated[int, Field(gt=0)], ...] = Field((1, 8), min_length=1)
    """Values of k in the reported pass@k."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    checkpoints: dict[str, str] = Field({})
    """Further models to evaluate beside those of the run: name and Hugging Face folder."""

    @model_validator(mode="after")
    def _check_ks(self) -> Evaluation:
        for k in self.ks:
            if k > self.samples_per_problem:
                raise ValueError(f"ks: expected at most samples_per_problem {self.samples_per_problem}, got {k}")
        return self


class Ranking(Section):
    """Stage `rank`."""

    k: int = Field(0, ge=0)
    """k of the pass@k to rank by; 0: the largest of evaluation.ks."""
    runs: tuple[str, ...] = ()
    """Further run folders whose evaluated checkpoints take part, as "FOLDER:name"."""
    after_rl: dict[str, float] = Field({})
    """Known pass@1 after RL of checkpoints; that of the run's arms is found."""
    trained_on: dict[str, str] = Field({})
    """A name for data and loss of a checkpoint's SFT, for checkpoints that no arm of a run made. Held-out losses are
    compared within one name."""

    @model_validator(mode="after")
    def _check_rates(self) -> Ranking:
        for name, value in self.after_rl.items():
            if not 0 <= value <= 1:
                raise ValueError(f"after_rl.{name}: expected a pass@1 from 0 to 1, got {value}")
        return self


class Tracking(Section):
    """Logs, and metrics beside metrics.jsonl."""

    logs: Literal["text", "json"] = "text"
    """Log lines for people, or JSON objects with run, stage and step."""
    tensorboard: bool = False
    """Write TensorBoard events to RUN/tensorboard."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project."""


class TaskSpec(Section):
    """A task: a family of problems with a grader."""

    name: str = Field(min_length=1)
    """"countdown", "math", "reasoning_gym", an entry point of the group `pear_ray.tasks`, or "package.module:Class"."""
    weight: float = Field(1.0, gt=0)
    """Share of the training problems, relative to the weights of the other tasks. `evaluate` takes the same number of
    held-out problems from each."""
    options: dict[str, Any] = Field({})
    """Options of the family; `label` distinguishes two tasks of one family."""


class Job(Section):
    """All sections."""

    run: Run
    """The run directory and the seed."""
    model: Model
    """The policy to train."""
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    """Problems for `sample`, `rl` and `evaluate`."""
    corpus: Corpus = Corpus()
    """The offline traces."""
    behavior: dict[str, ModelSource] = Field({})
    """The model that wrote the rows of each `source`."""
    sft: Sft = Sft()
    """Stage `sft`."""
    rl: Rl = Rl()
    """Stage `rl`."""
    cooperate: Cooperate | None = None
    """Stage `cooperate`; if set, a job without arms runs `cooperate` instead of `rl`."""
    generator: Generator
    """The vLLM engines."""
    learner: Learner = Learner()
    """The DeepSpeed ranks."""
    weights: Weights = Weights()
    """Weight transfer."""
    rewards: Rewards = Rewards()
    """Reward workers."""
    evaluation: Evaluation = Evaluation()
    """Stage `evaluate`."""
    rank: Ranking = Ranking()
    """Stage `rank`."""
    tracking: Tracking = Tracking()
    """Logs and metrics."""
    placement: Placement = Placement()
    """Node labels of each role."""
    arms: tuple[Arm, ...] = ()
    """Arms of stages `pipeline` and `study`; without any, the job is the only one."""
    study: Study = Study()
    """Stage `study`."""

    @model_validator(mode="after")
    def _check_sources(self) -> Job:
        sampled = self.corpus.sample.num_examples if self.corpus.sample else ()
        sources = {f"sample.num_examples.{source}": source for source in sampled}
        # The job of an arm has no behavior models: its corpus is scored already.
        if self.behavior:
            sources |= {key: getattr(self.corpus, key) for key in ("source", "fallback_scorer")}
        for key, source in sources.items():
            if source is not None and source not in self.behavior:
                raise ValueError(f"corpus.{key}: expected one of [behavior] {sorted(self.behavior)}, got {source!r}")
        models = {"base": self.model, **self.behavior}
        for name, model in models.items():
            start = model.pretrain.start_from if model.pretrain else None
            parent = models[start].pretrain if start in models else None
            if start is not None and (parent is None or parent.start_from is not None):
                table = "model" if model is self.model else f"behavior.{name}"
                raise ValueError(
                    f"{table}.pretrain.start_from: expected a model with `pretrain` and without"
                    f" start_from, got {start!r}"
                )
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> Job:
        max_model_len, max_new_tokens = self.generator.max_model_len, self.generator.max_new_tokens
        if self.learner.tokens_per_pack < max_model_len:
            raise ValueError(
                "learner.tokens_per_micro_batch: expected room for a sequence of generator.max_model_len"
                f" {max_model_len} on sequence_parallel {self.learner.sequence_parallel} ranks, got"
                f" {self.learner.tokens_per_micro_batch}"
            )
        if self.rl.overlong_buffer_tokens > max_new_tokens:
            raise ValueError(
                f"rl.overlong_buffer_tokens: expected at most generator.max_new_tokens"
                f" {max_new_tokens}, got {self.rl.overlong_buffer_tokens}"
            )
        num_groups = self.learner.num_workers // self.learner.sequence_parallel
        if self.rl.prompts_per_step * self.rl.group_size < num_groups:
            raise ValueError(
                f"rl.prompts_per_step: expected a completion for each of {num_groups} ranks of learner.num_workers, got"
                f" {self.rl.prompts_per_step} prompts with {self.rl.group_size} each"
            )
        if self.cooperate is not None:
            self.cooperate.check_job(self.sft, self.rl, self.learner)
        return self

    @model_validator(mode="after")
    def _check_arms(self) -> Job:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arms: expected each name once, got {names}")
        if unknown := sorted(set(self.study.arms) - set(names)):
            raise ValueError(f"study.arms: expected names among {names}, got {unknown}")
        compared = [arm.name for arm in self.study_arms]
        if self.study.baseline not in (None, *compared):
            raise ValueError(f"study.baseline: expected one of {compared}, got {self.study.baseline!r}")
        trained = {"sft": self.sft}
        for arm in self.arms:
            try:
                job = self.of_arm(arm)
            except ValidationError as error:
                lines = describe(error, Job, f"arms.{arm.name}")
                raise ValueError("\n".join(lines)) from error
            if arm.sft:
                trained[f"arms.{arm.name}.sft"] = job.sft
        # A corpus that was scored before may hold top log-probs: the stage checks.
        distilled = [key for key, sft in trained.items() if sft.objective.type == "kl"]
        if distilled and self.corpus.scored_path is None and not self.corpus.top_logprobs:
            raise ValueError(f'corpus.top_logprobs: expected at least 1 for {distilled[0]}.objective "kl", got 0')
        return self

    @property
    def study_arms(self) -> tuple[Arm, ...]:
        """The arms that `study` compares."""
        return tuple(arm for arm in self.arms if arm.name in (self.study.arms or (arm.name,)))

    def last_stage_of(self, home: str) -> str:
        """Return the last training stage in one of the `homes`."""
        of_arms = {arm.name: arm.last_stage for arm in self.arms}
        return of_arms.get(home.partition("@")[0], last_stage_with(self.cooperate))

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.run.dir)

    def model_path(self, source: str | None = None) -> str:
        """Return folder or hub name of the base model, or of the behavior model of `source`."""
        origin = self.model if source is None else self.behavior[source]
        if origin.path is not None:
            return origin.path
        return str((self.folder / "pretrain" / (source or "base")).absolute())

    @property
    def scored_folder(self) -> Path:
        """Folder of the ScoredExample rows."""
        return Path(self.corpus.scored_path) if self.corpus.scored_path else self.folder / "scored"

    def homes(self, folder: Path) -> dict[str, Path]:
        """Return the output folders of training stages below a run directory, by the prefix of their checkpoints'
        labels: "" for the run itself, "pear" for an arm, "pear@3" for an arm with a seed of a study."""
        arms = {arm.name: folder / "arms" / arm.name for arm in self.arms}
        seeds = {
            f"{arm.name}@{seed}": folder / "seeds" / str(seed) / arm.name
            for seed in self.study.seeds
            for arm in self.study_arms
        }
        return {"": folder} | arms | seeds

    def of_arm(self, arm: Arm, seed: int | None = None) -> Job:
        """Return the job of an arm, or of an arm with a seed of a study: in a run directory below this one, on this
        job's scored corpus."""
        document = self.model_dump()
        name = arm.name if seed is None else f"{arm.name}@{seed}"
        document["run"]["dir"] = str(self.homes(self.folder)[name])
        document["run"]["seed"] = self.run.seed if seed is None else seed
        document["model"] = {"path": self.model_path(), "dtype": self.model.dtype}
        document["behavior"] = {}
        document["corpus"] |= {"sample": None, "path": None}
        document["corpus"]["scored_path"] = str(self.scored_folder.absolute())
        document["sft"] = overridden(self.sft, arm.sft or {})
        document["rl"] = overridden(self.rl, arm.rl)
        shared = self.cooperate or Cooperate()
        document["cooperate"] = None
        if arm.cooperate is not None:
            document["cooperate"] = overridden(shared, arm.cooperate)
        document["arms"], document["study"] = (), {}
        return Job(**document)
