"""`--plan`: which devices a job needs, how many, and what fills them; needs no cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pear_ray.config import Cooperate, Job
from pear_ray.errors import ConfigError
from pear_ray.train import memory
from pear_ray.train.memory import GIB, ModelDims, read_model_dims

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
# Usable GiB of the GPUs that are sold, and their nominal GB.
GPUS = {22: 24, 39: 40, 44: 48, 79: 80, 94: 96, 139: 141, 178: 192}


@dataclass(frozen=True)
class Role:
    """Processes of one kind in one stage. Example: Role("sft", "ranks", 8, {"weights": 2.0e9, ...}) is 8 devices with 2
    GB of weights each."""

    stage: str
    name: str
    num_devices: int
    items: Mapping[str, float]
    usable_share: float = 1.0
    """Share of a device's memory that the process may take."""

    @property
    def device_bytes(self) -> float:
        """Memory that a device must have."""
        return sum(self.items.values()) / self.usable_share

    @property
    def breakdown(self) -> str:
        """The items in GiB."""
        return ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.items.items() if size)

    @property
    def remedy(self) -> str:
        """Keys of the job that make the role smaller."""
        if self.name != "ranks":
            return "a larger generator.tensor_parallel_size or a smaller generator.max_num_seqs"
        shadow = ", cooperate.method.shadow_offload" if "shadow" in self.items else ""
        keys = f"more learner.num_workers, a smaller learner.tokens_per_micro_batch{shadow}"
        return f"{keys}, learner.activation_checkpointing or learner.offload"


def plan(job: Job) -> str:
    """Return the table, one line per role; raise ConfigError if a model's configuration cannot be read, or a role does
    not fit into `placement.gpu_gib`."""
    paths = {"model.path": job.model_path()}
    paths |= {f"behavior.{source}.path": job.model_path(source) for source in job.behavior}
    dims_by_field = {field: read_model_dims(field, path) for field, path in paths.items()}
    roles = list(job_roles(job, dims_by_field))
    gpu_gib = job.placement.gpu_gib
    for role in roles:
        if gpu_gib is not None and role.device_bytes > gpu_gib * GIB:
            raise ConfigError(
                f"placement.gpu_gib: expected at least {role.device_bytes / GIB:.1f} for {role.name} of stage"
                f" {role.stage} ({role.breakdown}), got {gpu_gib:g}; use larger GPUs or {role.remedy}"
            )
    lines = [
        f"{field}: {dims.num_parameters / 1e9:.2f} billion parameters, {dims.num_layers} layers of width {dims.hidden}"
        for field, dims in dims_by_field.items()
    ]
    lines += ["", f"{'stage':<10}{'role':<28}{'devices':>8}{'GiB each':>10}  of which (GiB)"]
    lines += [table_line(role, gpu_gib) for role in roles]
    dims, element_bytes = dims_by_field["model.path"], ELEMENT_BYTES[job.model.dtype]
    num_ranks = job.learner.num_workers
    on_node = min(num_ranks, 8)
    sizes = [memory.store_memory(dims, element_bytes, count, num_ranks) / GIB for count in (on_node, 0)]
    lines += [
        "",
        f"object store: {sizes[0]:.1f} GiB on a node with {on_node} of the ranks, {sizes[1]:.1f} GiB on a node with"
        " engines: two versions of the weights",
    ]
    return "\n".join(lines)


def job_roles(job: Job, dims_by_field: Mapping[str, ModelDims]) -> Iterator[Role]:
    """Yield the roles of every stage, in the order of the stages."""
    student = dims_by_field["model.path"]
    for stage in ("sample", "score") if job.corpus.sample else ("score",):
        for source in job.behavior:
            yield engine_role(job, stage, source, dims_by_field[f"behavior.{source}.path"])
    yield rank_role(job, "sft", student)
    settings = [job.of_arm(arm).cooperate for arm in job.arms] or [job.cooperate]
    if None in settings:
        yield rank_role(job, "rl", student)
        yield engine_role(job, "rl", "student", student)
    if ranks := [cooperate_role(job, own, student) for own in settings if own is not None]:
        yield max(ranks, key=lambda role: role.device_bytes)
        yield engine_role(job, "cooperate", "student", student)
    yield engine_role(job, "evaluate", "student", student)


def rank_role(job: Job, stage: str, dims: ModelDims) -> Role:
    """Return the learner ranks of a stage."""
    items = memory.rank_memory(dims, ELEMENT_BYTES[job.model.dtype], job.learner, num_trained(job, dims))
    return Role(stage, "ranks", job.learner.num_workers, items)


def num_trained(job: Job, dims: ModelDims) -> int:
    """Return the number of trained parameters: all, or those of the adapters."""
    return dims.num_parameters if job.learner.lora is None else dims.lora_parameters(job.learner.lora)


def cooperate_role(job: Job, cooperate: Cooperate, dims: ModelDims) -> Role:
    """Return the ranks of `cooperate`: those of `rl` plus what the method keeps. MIFO keeps copies of what it may
    freeze; BRIDGE trains adapters beside the weights, and keeps a shadow of both."""
    learner, method = job.learner, cooperate.method
    if method.type != "bridge":
        role = rank_role(job, "cooperate", dims)
        freezes = method.type == "alternate" and method.frozen_frac > 0
        if not freezes or learner.offload != "none":
            return role
        frozen = memory.FROZEN_BYTES * num_trained(job, dims) / learner.num_workers
        return replace(role, items={**role.items, "frozen": frozen})
    element_bytes = ELEMENT_BYTES[job.model.dtype]
    total = dims.num_parameters + dims.lora_parameters(method.lora)
    joint = replace(dims, num_parameters=total)
    items = memory.rank_memory(joint, element_bytes, learner, total)
    if method.meta_objective:
        shadow = learner.model_copy(update={"offload": method.shadow_offload})
        shadow_items = memory.rank_memory(joint, element_bytes, shadow, total)
        items["shadow"] = sum(shadow_items.get(name, 0.0) for name in memory.IDLE_ITEMS)
    return Role("cooperate", "ranks", learner.num_workers, items)


def engine_role(job: Job, stage: str, name: str, dims: ModelDims) -> Role:
    """Return the vLLM engines of a stage. Scoring computes logits of every token in a batch, sampling those of one
    token per sequence."""
    settings, element_bytes = job.generator, ELEMENT_BYTES[job.model.dtype]
    num_logits = settings.max_num_batched_tokens if stage == "score" else settings.max_num_seqs
    parallel = settings.tensor_parallel_size
    items = memory.engine_memory(dims, element_bytes, parallel, num_logits, settings.max_model_len)
    usable_share = settings.gpu_memory_utilization if settings.num_gpus else 1.0
    return Role(stage, f"engines of {name}", settings.num_engines * parallel, items, usable_share)


def table_line(role: Role, gpu_gib: float | None) -> str:
    """Return one role's line of the table."""
    needed = role.device_bytes / GIB
    size = gpu_gib or next((gib for gib in GPUS if gib >= needed), None)
    if size is None:
        fit = "more than any GPU has"
    else:
        fit = f"fits {size:g} GiB" if gpu_gib else f"a GPU of {GPUS[int(size)]} GB"
        if per_sequence := role.items.get("one sequence"):
            free = size * GIB * role.usable_share - sum(role.items.values()) + per_sequence
            fit += f", cache for {int(free // per_sequence)} sequences of full length"
    return f"{role.stage:<10}{role.name:<28}{role.num_devices:>8}{needed:>10.1f}  {role.breakdown}; {fit}"
