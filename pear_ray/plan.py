"""`--plan`: how many GPUs of which size a job needs, and for what, without a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pear_ray.config import Cooperate, Job, Lora
from pear_ray.errors import ConfigError
from pear_ray.train.memory import (
    GIB,
    HELD,
    ModelDims,
    Training,
    at_rest,
    of_engine,
    of_rank,
    of_store,
)
from pear_ray.train.model_dims import model_dims

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
# GPUs that are sold: GiB of memory that a program finds, by what they are called.
GPUS = {
    22: "24 GB",
    39: "40 GB",
    44: "48 GB",
    79: "80 GB",
    94: "96 GB",
    139: "141 GB",
    178: "192 GB",
}


@dataclass(frozen=True)
class Role:
    """Processes of one kind in one stage: how many devices, and what each of them holds."""

    stage: str
    name: str
    num_devices: int
    items: Mapping[str, float]
    share: float = 1.0
    """Of a device's memory, what it may take."""

    @property
    def device_bytes(self) -> float:
        """Memory that a device must have."""
        return sum(self.items.values()) / self.share

    @property
    def per_sequence(self) -> float:
        """Of an engine: bytes of cache for one sequence of full length; of others nothing."""
        return self.items.get("one sequence", 0.0)


def plan(job: Job) -> str:
    """The table, one line for each role.

    Raises:
        ConfigError: a model's configuration cannot be read, or a role does not fit into
            `placement.gpu_gib`.
    """
    shapes = {"model.path": model_dims("model.path", job.model_path())}
    for source in job.behavior:
        field = f"behavior.{source}.path"
        shapes[field] = model_dims(field, job.model_path(source))
    roles = list(roles_of(job, shapes))
    size = job.placement.gpu_gib
    for role in roles:
        if size is not None and role.device_bytes > size * GIB:
            raise ConfigError(
                f"placement.gpu_gib: read {size:g}, but {role.name} of stage {role.stage} needs"
                f" {role.device_bytes / GIB:.1f} GiB on each device: {in_words(role)}; expected"
                f" larger GPUs or {remedy(role)}"
            )
    student = shapes["model.path"]
    lines = [
        f"{field}: {shape.num_parameters / 1e9:.2f} billion parameters, {shape.num_layers} layers"
        f" of width {shape.hidden}"
        for field, shape in shapes.items()
    ]
    lines += ["", f"{'stage':<10}{'role':<28}{'devices':>8}{'GiB each':>10}  of which (GiB)"]
    lines += [line(role, size) for role in roles]
    width = ELEMENT_BYTES[job.model.dtype]
    ranks = job.learner.num_workers
    on_node = min(ranks, 8)
    lines += [
        "",
        f"object store: {of_store(student, width, on_node, ranks) / GIB:.1f} GiB on a node with"
        f" {on_node} of the ranks, {of_store(student, width, 0, ranks) / GIB:.1f} GiB on a node"
        " with engines: two versions of the weights",
    ]
    return "\n".join(lines)


def roles_of(job: Job, shapes: Mapping[str, ModelDims]) -> Iterator[Role]:
    """In the order of the stages."""
    student = shapes["model.path"]
    for stage in ("sample", "score") if job.corpus.sample else ("score",):
        for source in job.behavior:
            yield engine(job, stage, source, shapes[f"behavior.{source}.path"])
    yield rank(job, "sft", student)
    settings = [job.of_arm(arm).cooperate for arm in job.arms] or [job.cooperate]
    if None in settings:
        yield rank(job, "rl", student)
        yield engine(job, "rl", "student", student)
    if both := [cooperating_rank(job, one, student) for one in settings if one is not None]:
        yield max(both, key=lambda role: role.device_bytes)
        yield engine(job, "cooperate", "student", student)
    yield engine(job, "evaluate", "student", student)


def rank(job: Job, stage: str, shape: ModelDims) -> Role:
    """A learner's rank."""
    items = of_rank(shape, ELEMENT_BYTES[job.model.dtype], training_of(job, shape))
    return Role(stage, "ranks", job.learner.num_workers, items)


def cooperating_rank(job: Job, cooperate: Cooperate, shape: ModelDims) -> Role:
    """A rank of `cooperate`: as of `rl`, with what its method keeps beside that."""
    if cooperate.method == "bridge":
        return bridge_rank(job, cooperate, shape)
    role, how = rank(job, "cooperate", shape), training_of(job, shape)
    if not cooperate.frozen_frac or how.offloads_optimizer:
        return role
    return replace(role, items={**role.items, "held": HELD * how.num_trainable / how.num_ranks})


def bridge_rank(job: Job, cooperate: Cooperate, shape: ModelDims) -> Role:
    """BRIDGE trains adapters beside the weights, and keeps a shadow of both."""
    width, num_elements = ELEMENT_BYTES[job.model.dtype], adapter_elements(shape, cooperate.lora)
    joint = replace(shape, num_parameters=shape.num_parameters + num_elements)
    how = replace(training_of(job, shape), num_trainable=joint.num_parameters)
    items = of_rank(joint, width, how)
    if cooperate.meta_objective:
        of_shadow = replace(
            how,
            offloads_optimizer=cooperate.shadow_offload != "none",
            offloads_parameters=cooperate.shadow_offload == "parameters",
        )
        items["shadow"] = at_rest(of_rank(joint, width, of_shadow))
    return Role("cooperate", "ranks", how.num_ranks, items)


def adapter_elements(shape: ModelDims, lora: Lora) -> int:
    """Two thin matrices beside each adapted one; at most as if all were of the widest kind."""
    widest = shape.hidden + max(shape.intermediate, shape.queries)
    return shape.num_layers * len(lora.targets) * lora.rank * widest


def training_of(job: Job, shape: ModelDims) -> Training:
    """How ranks are set up."""
    settings = job.learner
    adapters = None if settings.lora is None else adapter_elements(shape, settings.lora)
    return Training(
        num_ranks=settings.num_workers,
        zero_stage=settings.zero_stage,
        num_trainable=shape.num_parameters if adapters is None else adapters,
        tokens_per_micro_batch=settings.tokens_per_micro_batch,
        checkpoints_activations=settings.activation_checkpointing,
        logits_bytes=settings.logits_mib * 2**20,
        offloads_optimizer=settings.offload != "none",
        offloads_parameters=settings.offload == "parameters",
    )


def engine(job: Job, stage: str, name: str, shape: ModelDims) -> Role:
    """A vLLM engine. Scoring makes logits for every token that it reads, sampling for one of each
    sequence."""
    settings, width = job.generator, ELEMENT_BYTES[job.model.dtype]
    tokens = settings.batch_tokens if stage == "score" else settings.max_num_seqs
    split, context = settings.tensor_parallel_size, settings.max_model_len
    items = of_engine(shape, width, split, tokens, context)
    num_devices = settings.num_engines * split
    share = settings.gpu_memory_utilization if settings.num_gpus else 1.0
    return Role(stage, f"engines of {name}", num_devices, items, share)


def line(role: Role, gpu_gib: float | None) -> str:
    """One role in the table."""
    needed = role.device_bytes / GIB
    size = gpu_gib or next((gib for gib in GPUS if gib >= needed), None)
    if size is None:
        grade = "more than any GPU has"
    else:
        grade = f"fits {size:g} GiB" if gpu_gib else f"a GPU of {GPUS[int(size)]}"
        if role.per_sequence:
            room = size * GIB * role.share - sum(role.items.values()) + role.per_sequence
            grade += f", cache for {int(room // role.per_sequence)} sequences of full length"
    return (
        f"{role.stage:<10}{role.name:<28}{role.num_devices:>8}{needed:>10.1f}  {in_words(role)};"
        f" {grade}"
    )


def in_words(role: Role) -> str:
    """What it holds."""
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in role.items.items() if size)


def remedy(role: Role) -> str:
    """What would make it smaller."""
    if role.name == "ranks":
        of_shadow = ", cooperate.shadow_offload" if "shadow" in role.items else ""
        return (
            "more learner.num_workers, a smaller learner.tokens_per_micro_batch"
            f"{of_shadow}, learner.activation_checkpointing or learner.offload"
        )
    return "a larger generator.tensor_parallel_size or a smaller generator.max_num_seqs"
