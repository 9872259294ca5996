"""What a job may say. One frozen section per part of the job, one docstring per field.

A job is a TOML file; `--section.key value` on the command line overrides it. Paths in a job are
relative to the folder in which the command is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pear_ray.config.arms import Arm, Study, last_stage_with
from pear_ray.config.base import Section
from pear_ray.config.cooperate import Cooperate
from pear_ray.config.corpus import Corpus
from pear_ray.config.errors import format_validation_error
from pear_ray.config.rl import Generator, Rl, Weights
from pear_ray.config.sft import Learner, Sft


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
    """Optimizer steps."""
    examples_per_step: int = Field(128, gt=0)
    """Demonstrations in one step."""
    learning_rate: float = Field(3e-3, gt=0)
    """Peak of the cosine schedule."""
    seed: int = 0
    """Seed of the initial weights and of the demonstrations."""
    start_from: str | None = None
    """Begin with the weights of another model of the job: "base", or a source of [behavior]."""
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
    timeout_seconds: float = Field(3600.0, gt=0)
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


class Ranking(Section):
    k: int = Field(0, ge=0)
    """k of the pass@k to rank by; 0: the largest of evaluation.ks."""
    runs: tuple[str, ...] = ()
    """Further run folders whose evaluated checkpoints take part, as "FOLDER:name"."""
    after_rl: dict[str, float] = Field({})
    """pass@1 after RL of checkpoints for which it is known; that of the run's arms is found."""
    trained_on: dict[str, str] = Field({})
    """A name for data and loss of a checkpoint's SFT, for those that no arm of a run made. Held-out
    losses are compared within one name."""

    @model_validator(mode="after")
    def _are_shares(self) -> Ranking:
        for name, value in self.after_rl.items():
            if not 0 <= value <= 1:
                raise ValueError(f"after_rl.{name}: read {value}; expected pass@1, from 0 to 1")
        return self


class Tracking(Section):
    logs: Literal["text", "json"] = "text"
    """Log lines for people, or JSON objects that name run, stage and step."""
    tensorboard: bool = False
    """Also write TensorBoard events to RUN/tensorboard."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""


class Placement(Section):
    """Node labels (`ray start --labels`, a worker group's `labels`) that say which role runs where.
    A value may also be "!value", "in(one, other)" or "!in(one, other)"."""

    learners: dict[str, str] = Field({})
    """Labels of the nodes for ranks of every stage that trains; none: any node."""
    generators: dict[str, str] = Field({})
    """Labels of the nodes for engines; none: any node."""
    gpu_gib: float | None = Field(None, gt=0)
    """Memory of one GPU in GiB, for `--plan` to refuse what cannot fit."""


class TaskSpec(Section):
    name: str = Field(min_length=1)
    """Which family of problems: "countdown", "math", "reasoning_gym", one that an installed package
    offers as an entry point of the group `pear_ray.tasks`, or "package.module:Class"."""
    weight: float = Field(1.0, gt=0)
    """Share of the training problems, relative to the other tasks' weights. `evaluate` takes as
    many held-out problems of each."""
    options: dict[str, Any] = Field({})
    """The family's own options; `label` tells two tasks of one family apart."""


class Rewards(Section):
    """Processes that judge answers."""

    processes: int = Field(2, gt=0)
    """How many there are: so many answers are judged at once."""
    timeout_seconds: float = Field(10.0, ge=0.1, le=3600)
    """Longest judging of one answer; cut off, it earns nothing."""
    memory_mib: int = Field(2048, ge=256)
    """Memory that judging an answer may take beyond what the process has already."""
    network: bool = False
    """Judges may reach the network, as one that asks another model must. Answers may run in some
    judges: without need it stays off."""


class Job(Section):
    run: Run
    """Where the run lives, and its seed."""
    model: Model
    """The policy to be trained."""
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
    """Stage `cooperate`; with it a job without arms goes through `cooperate` instead of `rl`."""
    generator: Generator
    """The vLLM engines."""
    learner: Learner = Learner()
    """The DeepSpeed ranks."""
    weights: Weights = Weights()
    """Weight hand-over."""
    rewards: Rewards = Rewards()
    """Processes that judge answers."""
    evaluation: Evaluation = Evaluation()
    """Stage `evaluate`."""
    rank: Ranking = Ranking()
    """Stage `rank`."""
    tracking: Tracking = Tracking()
    """Where numbers go besides metrics.jsonl."""
    placement: Placement = Placement()
    """Which role runs where."""
    arms: tuple[Arm, ...] = ()
    """Arms of stages `pipeline` and `study`; without any, the job itself is the only one."""
    study: Study = Study()
    """Stage `study`: every arm with several seeds."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Job:
        if self.learner.tokens_per_pack < self.generator.max_model_len:
            raise ValueError(
                f"learner.tokens_per_micro_batch {self.learner.tokens_per_micro_batch} (shared by"
                f" {self.learner.sequence_parallel}) cannot hold"
                f" one sequence of generator.max_model_len {self.generator.max_model_len} tokens"
            )
        for field in ("source", "fallback_scorer"):
            named = getattr(self.corpus, field)
            # The job of an arm has no behavior models: its corpus is scored already.
            if named is not None and self.behavior and named not in self.behavior:
                raise ValueError(
                    f"corpus.{field}: read {named!r}, expected one of [behavior]:"
                    f" {sorted(self.behavior)}"
                )
        if self.corpus.sample is not None:
            for source in self.corpus.sample.num_examples:
                if source not in self.behavior:
                    raise ValueError(
                        f"corpus.sample.num_examples names source {source!r}, expected one of"
                        f" [behavior]: {sorted(self.behavior)}"
                    )
        made = {"base": self.model, **self.behavior}
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
        if unknown := sorted(set(self.study.arms) - set(names)):
            raise ValueError(f"study.arms: read {unknown}; expected names among {names}")
        named = [arm.name for arm in self.study_arms]
        if self.study.baseline not in (None, *named):
            raise ValueError(
                f"study.baseline: read {self.study.baseline!r}; expected an arm: {named}"
            )
        for arm in self.arms:
            changes: dict[str, tuple[Section, dict[str, Any]]] = {
                "sft": (self.sft, arm.sft or {}),
                "rl": (self.rl, arm.rl),
            }
            if arm.cooperate is not None:
                changes["cooperate"] = self.cooperate or Cooperate(), arm.cooperate
            for key, (section, changed) in changes.items():
                try:
                    type(section)(**{**section.model_dump(), **changed})
                except ValidationError as error:
                    where = f"arms.{arm.name}.{key}"
                    raise ValueError(
                        format_validation_error(where, error, type(section))
                    ) from error
        return self

    @model_validator(mode="after")
    def _both_signals_fit(self) -> Job:
        if self.cooperate is not None:
            self.cooperate.refuse_misfits(self.sft, self.rl, self.learner)
        for arm in self.arms:
            if arm.cooperate is not None:
                try:
                    self.of_arm(arm)
                except ValidationError as error:
                    raise ValueError(
                        format_validation_error(f"arms.{arm.name}", error, Job)
                    ) from error
        return self

    @model_validator(mode="after")
    def _rl_fits_the_machines(self) -> Job:
        cache, longest = self.rl.overlong_buffer_tokens, self.generator.max_new_tokens
        if cache > longest:
            raise ValueError(
                f"rl.overlong_buffer_tokens: read {cache}; expected at most"
                f" generator.max_new_tokens, {longest}"
            )
        num_answers = self.rl.prompts_per_step * self.rl.group_size
        if num_answers < self.learner.num_workers // self.learner.sequence_parallel:
            raise ValueError(
                f"rl.prompts_per_step {self.rl.prompts_per_step} of {self.rl.group_size} answers"
                f" are fewer than learner.num_workers {self.learner.num_workers} can share"
            )
        return self

    @model_validator(mode="after")
    def _distillation_has_a_teacher(self) -> Job:
        objectives = {"sft": self.sft.objective} | {
            f"arms.{arm.name}.sft": arm.sft.get("objective") for arm in self.arms if arm.sft
        }
        distilled = [where for where, objective in objectives.items() if objective == "kl"]
        # A corpus that was scored before brings what it has, and the stage looks.
        if distilled and self.corpus.scored_path is None and not self.corpus.top_logprobs:
            raise ValueError(
                f'{distilled[0]}.objective: read "kl", which needs likeliest tokens of'
                " the behavior policy, and corpus.top_logprobs 0; expected at least 1"
            )
        return self

    @property
    def study_arms(self) -> tuple[Arm, ...]:
        """The arms that `study` compares."""
        return tuple(arm for arm in self.arms if arm.name in (self.study.arms or (arm.name,)))

    def last_stage_of(self, home: str) -> str:
        """The stage that training ends with in one of the `homes`."""
        of_arms = {arm.name: arm.last_stage for arm in self.arms}
        return of_arms.get(home.partition("@")[0], last_stage_with(self.cooperate))

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.dir)

    def model_path(self, source: str | None = None) -> str:
        """Folder or hub name of the model to be trained, or of the behavior model of `source`."""
        origin = self.model if source is None else self.behavior[source]
        if origin.path is not None:
            return origin.path
        return str((self.folder / "pretrain" / (source or "base")).absolute())

    @property
    def scored_folder(self) -> Path:
        """Where the ScoredExample rows are."""
        return Path(self.corpus.scored_path) if self.corpus.scored_path else self.folder / "scored"

    def homes(self, folder: Path) -> dict[str, Path]:
        """Below the run folder, where stages that train leave what they make, by the name that
        begins the labels of their checkpoints: the run itself "", arms "pear", and in a study
        "pear@3"."""
        arms = {arm.name: folder / "arms" / arm.name for arm in self.arms}
        seeds = {
            f"{arm.name}@{seed}": folder / "seeds" / str(seed) / arm.name
            for seed in self.study.seeds
            for arm in self.study_arms
        }
        return {"": folder} | arms | seeds

    def of_arm(self, arm: Arm, seed: int | None = None) -> Job:
        """The job of one arm, or of one arm of a study with a seed of its own: its run folder is
        below this one's, its corpus is this one's, scored."""
        document = self.model_dump()
        name = arm.name if seed is None else f"{arm.name}@{seed}"
        document["run"]["dir"] = str(self.homes(self.folder)[name])
        document["run"]["seed"] = self.run.seed if seed is None else seed
        document["model"] = {"path": self.model_path(), "dtype": self.model.dtype}
        document["behavior"] = {}
        document["corpus"] |= {"sample": None, "path": None}
        document["corpus"]["scored_path"] = str(self.scored_folder.absolute())
        document["sft"] |= arm.sft or {}
        document["rl"] |= arm.rl
        own = self.cooperate or Cooperate()
        document["cooperate"] = None if arm.cooperate is None else own.model_dump() | arm.cooperate
        document["arms"], document["study"] = (), {}
        return Job(**document)
