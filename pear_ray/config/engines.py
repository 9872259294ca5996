"""Keys of everything that reserves devices: vLLM engines, DeepSpeed ranks, reward workers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pear_ray.config.base import Section
from pear_ray.errors import require


class Generator(Section):
    """vLLM engines for sampling, scoring and evaluation."""

    num_engines: int = Field(1, gt=0)
    """Largest number of engines: `score`, `rl` and `cooperate` start more while requests wait."""
    min_engines: int = Field(default_factory=lambda data: data["num_engines"], gt=0)
    """Engines to start with and keep; by default `num_engines`."""
    tensor_parallel_size: int = Field(1, gt=0)
    """GPUs (or CPU processes) per engine."""
    num_cpus: float = Field(1.0, ge=0)
    """CPUs an engine reserves in Ray."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs an engine reserves in Ray."""
    threads: int = Field(1, gt=0)
    """Compute threads of an engine on CPUs."""
    max_new_tokens: int = Field(gt=0)
    """Longest completion, in tokens."""
    max_model_len: int = Field(gt=0)
    """Longest prompt plus completion, in tokens."""
    max_num_seqs: int = Field(256, gt=0)
    """Largest number of requests in an engine's batch."""
    max_num_batched_tokens: int = Field(default_factory=lambda data: 8192 if data["num_gpus"] > 0 else 2048, gt=0)
    """Largest number of tokens in an engine's forward pass; longer prompts are split into chunks. By default 8192 on
    GPUs and 2048 on CPUs."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Fraction of a GPU's memory that an engine may use."""
    kv_cache_gib: int = Field(1, gt=0)
    """Size of the KV cache of an engine on CPUs, in GiB."""
    metrics: bool = True
    """Export vLLM's metrics (requests, tokens, cache) at Ray's Prometheus endpoint."""
    timeout_seconds: float = Field(600.0, gt=0)
    """Longest wait for an engine to start, or to finish a batch of requests."""

    @property
    def num_actor_gpus(self) -> float:
        """GPUs of the engine actor: with tensor parallelism vLLM's own Ray workers hold them."""
        return self.num_gpus if self.tensor_parallel_size == 1 else 0.0

    def _check(self) -> None:
        longest, limit = self.max_new_tokens, self.max_model_len
        require(longest < limit, "max_new_tokens", f"less than max_model_len {limit}", longest)
        batched, num_seqs = self.max_num_batched_tokens, self.max_num_seqs
        expected = f"at least max_num_seqs {num_seqs}, since each request has a token in each batch"
        require(batched >= num_seqs, "max_num_batched_tokens", expected, batched)
        fewest, most = self.min_engines, self.num_engines
        require(fewest <= most, "min_engines", f"at most num_engines {most}", fewest)


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685), through peft."""

    rank: int = Field(16, gt=0)
    """Rank of each adapter."""
    alpha: int = Field(32, gt=0)
    """An adapter's output is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on an adapter's inputs during training."""
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """Names of the linear layers that get an adapter."""


class Learner(Section):
    """DeepSpeed ranks under Ray Train."""

    num_workers: int = Field(2, gt=0)
    """Ranks over which parameters, gradients and optimizer states are partitioned."""
    min_workers: int = Field(default_factory=lambda data: data["num_workers"], gt=0)
    """Continue with this many ranks while nodes are missing; by default `num_workers`."""
    cpus_per_worker: float = Field(1.0, ge=0)
    """CPUs a rank reserves in Ray."""
    use_gpu: bool = False
    """One GPU per rank and NCCL; otherwise CPU threads and gloo."""
    tokens_per_micro_batch: int = Field(8192, gt=0)
    """Packed tokens in a forward and backward pass of a rank."""
    sequence_parallel: int = Field(1, gt=0)
    """Ranks that share each pack, for sequences too long for one rank (DeepSpeed-Ulysses). A pack then has that many
    times `tokens_per_micro_batch`."""
    logits_mib: float = Field(512.0, gt=0)
    """Memory for logits and their softmax; micro-batches that need more compute them in chunks, in the forward and
    again in the backward pass."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """ZeRO partitions nothing, optimizer states, gradients too, or parameters too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep optimizer states, or parameters too, in the memory of the GPU's host."""
    lora: Lora | None = None
    """Train low-rank adapters instead of the weights."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    timeout_seconds: float = Field(600.0, gt=0)
    """Longest wait for resources, for another rank, for rollouts or for a checkpoint."""
    max_failures: int = Field(2, ge=0)
    """How often Ray Train restarts the ranks after one of them died."""
    save_every: int = Field(50, gt=0)
    """Optimizer steps between checkpoints to resume from."""

    @property
    def tokens_per_pack(self) -> int:
        """Packed tokens of the ranks that share a pack."""
        return self.tokens_per_micro_batch * self.sequence_parallel

    def _check(self) -> None:
        fewest, most, shared = self.min_workers, self.num_workers, self.sequence_parallel
        require(fewest <= most, "min_workers", f"at most num_workers {most}", fewest)
        for key, number in (("num_workers", most), ("min_workers", fewest)):
            require(number % shared == 0, key, f"a multiple of sequence_parallel {shared}", number)
        require(shared == 1 or fewest == most, "min_workers", f"num_workers {most} with sequence_parallel", fewest)
        lowest = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        expected = f"at least {lowest} with offload {self.offload!r}"
        require(self.zero_stage >= lowest, "zero_stage", expected, self.zero_stage)


class Weights(Section):
    """Weight transfer from learners to engines, through the object store."""

    bucket_mib: int = Field(512, gt=0)
    """Size of an object in the store; a rank's shard of the model is cut into such buckets."""
    timeout_seconds: float = Field(300.0, gt=0)
    """Longest wait for a version."""
    full_every: int = Field(8, gt=0)
    """One version in this many is published in full, the others as deltas if below half the size; 1: all in full."""
    max_logprob_gap: float = Field(0.1, gt=0)
    """`rl` stops if engine and learner disagree by more nats in the parity check."""


class Rewards(Section):
    """Processes that grade completions."""

    processes: int = Field(2, gt=0)
    """Number of processes; each grades one completion at a time."""
    timeout_seconds: float = Field(10.0, ge=0.1, le=3600)
    """Time limit for grading a completion; a late one earns reward 0."""
    memory_mib: int = Field(2048, ge=256)
    """Memory that grading a completion may use beyond what the process uses already, in MiB."""
    network: bool = False
    """Allow network access, for graders that call another model. Some graders execute completions: leave it off unless
    needed."""


class Placement(Section):
    """Node labels (`ray start --labels`, a worker group's `labels`) that nodes of a role must have. A value may also be
    "!value", "in(a, b)" or "!in(a, b)"."""

    learners: dict[str, str] = Field({})
    """Labels of the nodes for training ranks; empty: any node."""
    generators: dict[str, str] = Field({})
    """Labels of the nodes for engines; empty: any node."""
    gpu_gib: float | None = Field(None, gt=0)
    """Memory of a GPU in GiB; `--plan` refuses a job that does not fit."""
