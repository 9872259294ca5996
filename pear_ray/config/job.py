"""A job: one frozen section per table, one docstring per key. Paths are relative to the working directory of the
command."""

from __future__ import annotations

from collections.abc import Collection
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from pear_ray.config.base import Section, describe, overridden
from pear_ray.config.engines import Generator, Learner, Placement, Rewards, Weights
from pear_ray.config.rl import Cooperate, Rl
from pear_ray.config.sft import Corpus, Sft, Temperature
from pear_ray.errors import ConfigError, require

# The last training stage of an arm: its checkpoints are "after RL".
LAST_STAGES = ("rl", "cooperate")
# Stages that leave a checkpoint to evaluate.
TRAINING_STAGES = ("sft", *LAST_STAGES)


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

    def _check(self) -> None:
        got = "neither" if self.path is None else "both"
        require((self.path is None) != (self.pretrain is None), "path", "either path or pretrain", got)


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
    temperature: Temperature = 1.0
    checkpoints: dict[str, str] = Field({})
    """Further models to evaluate beside those of the run: name and Hugging Face folder."""

    def _check(self) -> None:
        for k in self.ks:
            require(k <= self.samples_per_problem, "ks", f"at most samples_per_problem {self.samples_per_problem}", k)


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

    def _check(self) -> None:
        for name, value in self.after_rl.items():
            require(0 <= value <= 1, f"after_rl.{name}", "a pass@1 from 0 to 1", value)


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


class Arm(Section):
    """One way through `sft` and `rl`, or `sft` and `cooperate`; arms share everything else."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Folder and label of the arm."""
    sft: dict[str, Any] | Literal[False] = Field({})
    """Keys of [sft] that differ in this arm; false: RL starts from the base model."""
    rl: dict[str, Any] = Field({})
    """Keys of [rl] that differ in this arm."""
    cooperate: dict[str, Any] | None = None
    """Keys of [cooperate] that differ in this arm; if set, even to {}, the arm runs `cooperate` instead of `rl`."""

    @property
    def last_stage(self) -> str:
        """The arm's last training stage."""
        return "rl" if self.cooperate is None else "cooperate"

    @property
    def stages(self) -> tuple[str, ...]:
        """The arm's training stages, in order."""
        return (self.last_stage,) if self.sft is False else ("sft", self.last_stage)


class Study(Section):
    """Stage `study`: every arm with several seeds."""

    seeds: tuple[int, ...] = ()
    """Each arm runs once with each of these seeds. Seeds and arms may be added later in the same run folder."""
    arms: tuple[str, ...] = ()
    """Arms that take part; empty: all."""
    max_parallel: int = Field(1, gt=0)
    """Runs at the same time, if the cluster has room for them."""
    baseline: str | None = None
    """Arm to which the others are compared; by default the first."""
    hypothesis: str = ""
    """Expected result, in words; stored before anything runs and shown in the report."""

    def _check(self) -> None:
        require(len(set(self.seeds)) == len(self.seeds), "seeds", "each one once", list(self.seeds))


class Job(Section):
    """All sections; the docstring of a table's class explains it."""

    run: Run
    model: Model
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    """Problems for `sample`, `rl` and `evaluate`."""
    corpus: Corpus = Corpus()
    behavior: dict[str, ModelSource] = Field({})
    """The model that wrote the rows of each `source`."""
    sft: Sft = Sft()
    rl: Rl = Rl()
    cooperate: Cooperate | None = None
    """Stage `cooperate`; if set, a job without arms runs `cooperate` instead of `rl`."""
    generator: Generator
    learner: Learner = Learner()
    weights: Weights = Weights()
    rewards: Rewards = Rewards()
    evaluation: Evaluation = Evaluation()
    rank: Ranking = Ranking()
    tracking: Tracking = Tracking()
    placement: Placement = Placement()
    arms: tuple[Arm, ...] = ()
    """Arms of stages `pipeline` and `study`; without any, the job is the only one."""
    study: Study = Study()

    def _check(self) -> None:
        self._check_sources()
        self._check_sizes()
        if self.cooperate is not None:
            self.cooperate.check_job(self.sft, self.rl, self.learner)
        self._check_arms()

    def _check_sources(self) -> None:
        sampled = self.corpus.sample.num_examples if self.corpus.sample else ()
        sources = {f"sample.num_examples.{source}": source for source in sampled}
        # The job of an arm has no behavior models: its corpus is scored already.
        if self.behavior:
            sources |= {key: getattr(self.corpus, key) for key in ("source", "fallback_scorer")}
        expected = f"one of [behavior] {sorted(self.behavior)}"
        for key, source in sources.items():
            require(source is None or source in self.behavior, f"corpus.{key}", expected, repr(source))
        models = {"base": self.model, **self.behavior}
        expected = "a model with `pretrain` and without start_from"
        for name, model in models.items():
            start = model.pretrain.start_from if model.pretrain else None
            parent = models[start].pretrain if start in models else None
            fits = start is None or (parent is not None and parent.start_from is None)
            table = "model" if model is self.model else f"behavior.{name}"
            require(fits, f"{table}.pretrain.start_from", expected, repr(start))

    def _check_sizes(self) -> None:
        rl, learner, generator = self.rl, self.learner, self.generator
        ranks = f"sequence_parallel {learner.sequence_parallel} ranks"
        expected = f"room for a sequence of generator.max_model_len {generator.max_model_len} on {ranks}"
        fits = learner.tokens_per_pack >= generator.max_model_len
        require(fits, "learner.tokens_per_micro_batch", expected, learner.tokens_per_micro_batch)
        longest, buffer = generator.max_new_tokens, rl.overlong_buffer_tokens
        require(buffer <= longest, "rl.overlong_buffer_tokens", f"at most generator.max_new_tokens {longest}", buffer)
        num_groups = learner.num_workers // learner.sequence_parallel
        expected = f"a completion for each of {num_groups} ranks of learner.num_workers"
        got = f"{rl.prompts_per_step} prompts with {rl.group_size} each"
        require(rl.prompts_per_step * rl.group_size >= num_groups, "rl.prompts_per_step", expected, got)

    def _check_arms(self) -> None:
        names = [arm.name for arm in self.arms]
        require(len(set(names)) == len(names), "arms", "each name once", names)
        unknown = sorted(set(self.study.arms) - set(names))
        require(not unknown, "study.arms", f"names among {names}", unknown)
        compared = [arm.name for arm in self.study_arms]
        baseline = self.study.baseline
        require(baseline in (None, *compared), "study.baseline", f"one of {compared}", repr(baseline))
        trained = {"sft": self.sft}
        for arm in self.arms:
            try:
                job = self.of_arm(arm)
            except ValidationError as error:
                raise ConfigError("\n".join(describe(error, Job, f"arms.{arm.name}"))) from error
            if arm.sft:
                trained[f"arms.{arm.name}.sft"] = job.sft
        # A corpus that was scored before may hold top log-probs: the stage checks.
        if self.corpus.scored_path is None and not self.corpus.top_logprobs:
            for key, sft in trained.items():
                expected = f'at least 1 for {key}.objective "kl"'
                require(sft.objective.type != "kl", "corpus.top_logprobs", expected, 0)

    @property
    def study_arms(self) -> tuple[Arm, ...]:
        """The arms that `study` compares."""
        return tuple(arm for arm in self.arms if arm.name in (self.study.arms or (arm.name,)))

    def last_stage_of(self, home: str) -> str:
        """Return the last training stage in one of the `homes`."""
        arms = {arm.name: arm.last_stage for arm in self.arms}
        return arms.get(home.partition("@")[0], "rl" if self.cooperate is None else "cooperate")

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
        homes = {"": folder} | {arm.name: folder / "arms" / arm.name for arm in self.arms}
        for seed, arm in product(self.study.seeds, self.study_arms):
            homes[f"{arm.name}@{seed}"] = folder / "seeds" / str(seed) / arm.name
        return homes

    def of_arm(self, arm: Arm, seed: int | None = None) -> Job:
        """Return the job of an arm, or of an arm with a seed of a study: in a run directory below this one, on this
        job's scored corpus."""
        document = self.model_dump()
        home = self.homes(self.folder)[arm.name if seed is None else f"{arm.name}@{seed}"]
        document["run"] |= {"dir": str(home), "seed": self.run.seed if seed is None else seed}
        document["corpus"] |= {"sample": None, "path": None, "scored_path": str(self.scored_folder.absolute())}
        cooperate = self.cooperate or Cooperate()
        document |= {
            "model": {"path": self.model_path(), "dtype": self.model.dtype},
            "behavior": {},
            "sft": overridden(self.sft, arm.sft or {}),
            "rl": overridden(self.rl, arm.rl),
            "cooperate": None if arm.cooperate is None else overridden(cooperate, arm.cooperate),
            "arms": (),
            "study": {},
        }
        return Job(**document)


def is_after_rl(label: str) -> bool:
    """Return whether a checkpoint is that of a last training stage."""
    return label.rpartition("/")[-1] in LAST_STAGES


def start_of(label: str, evaluated: Collection[str]) -> str | None:
    """Return the label of the checkpoint that the training of `label` started from: "base" for SFT; for a last stage
    its arm's SFT if that was evaluated, else "base". None if `label` names no trained checkpoint."""
    prefix, slash, stage = label.rpartition("/")
    own = f"{prefix}{slash}sft"
    if is_after_rl(label) and own in evaluated:
        return own
    return "base" if stage in TRAINING_STAGES else None
