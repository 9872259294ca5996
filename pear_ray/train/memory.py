"""Memory of a rank, an engine and a node's object store in bytes, from a model's config alone.

A rank follows ZeRO (arXiv 1910.02054, section 3: 16 bytes per parameter in mixed precision, partitioned by stage) and
DeepSpeed's default buckets. The activations of a layer were counted with hooks on saved tensors, for gated MLPs and an
attention that does not keep its scores (tests/train/test_memory.py). An engine gives the rest of its memory to the
key-value cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pear_ray.config import Learner as LearnerConfig
from pear_ray.config import Lora
from pear_ray.errors import ConfigError

GIB = 2**30
# DeepSpeed's defaults, in elements: parameters gathered at once and prefetched, gradients reduced at once, parameters
# updated at once.
MAX_LIVE, PREFETCH, REDUCE_BUCKET, SUB_GROUP = 10**9, 5 * 10**7, 5 * 10**8, 10**9
# Context, communication, and fragmentation in PyTorch's allocator.
OVERHEAD = 3 * GIB
# Items of `rank_memory` that a learner keeps while another one on its device works.
IDLE_ITEMS = ("weights", "gradients", "optimizer", "buckets")
# Bytes per element that a step may freeze: its values before and between two updates, in float32, and a mask.
FROZEN_BYTES = 4 + 4 + 1
# vLLM's CUDA graphs and context.
ENGINE_OVERHEAD = 2 * GIB


@dataclass(frozen=True)
class ModelDims:
    """The dimensions of a decoder that decide its memory. Example: ModelDims(8_190_735_360, 36, 4096, 12288, 4096,
    1024, 151_936) is Qwen3-8B in full."""

    num_parameters: int
    num_layers: int
    hidden: int
    intermediate: int
    queries: int
    """Query heads times their width."""
    keys: int
    """Key heads times their width; values are the same."""
    vocabulary: int

    @property
    def saved_per_token(self) -> int:
        """Elements that a layer saves per token for the backward pass."""
        return 8 * self.hidden + 4 * self.intermediate + 5 * self.queries + 5 * self.keys

    def lora_parameters(self, lora: Lora) -> int:
        """Return an upper bound of the adapters' parameters: two thin matrices beside each adapted layer, all as wide
        as the widest."""
        widest = self.hidden + max(self.intermediate, self.queries)
        return self.num_layers * len(lora.targets) * lora.rank * widest


def read_model_dims(field: str, path: str) -> ModelDims:
    """Read the dimensions of a folder (config.json is enough) or hub name; load no weights. Raise ConfigError, naming
    the job's `field`, if no configuration can be read."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        expected = "expected a folder with config.json or a reachable hub name"
        raise ConfigError(f"{field}: {expected}, got {path!r}: {str(error).splitlines()[0]}") from error
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelDims(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        queries=text.num_attention_heads * head_width,
        keys=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_width,
        vocabulary=text.vocab_size,
    )


def rank_memory(dims: ModelDims, element_bytes: int, learner: LearnerConfig, num_trained: int) -> dict[str, float]:
    """Return the bytes of each item on a rank's device; `num_trained` parameters get gradients."""
    stage, num_ranks = learner.zero_stage, learner.num_workers
    weight_ranks, gradient_ranks, state_ranks = (num_ranks if stage >= s else 1 for s in (3, 2, 1))
    state_bytes = 12 if element_bytes == 2 or stage > 0 else 8  # 4 of them a master copy
    items = {
        "weights": 0.0 if learner.offload == "parameters" else dims.num_parameters * element_bytes / weight_ranks,
        "gradients": num_trained * element_bytes / gradient_ranks,
        "optimizer": state_bytes * num_trained / state_ranks if learner.offload == "none" else 0.0,
        "step": 4.0 * min(num_trained / state_ranks, SUB_GROUP) if learner.offload == "none" else 0.0,
    }
    if stage == 3:
        items["gathered"] = (min(dims.num_parameters, MAX_LIVE) + PREFETCH) * element_bytes
    if stage > 0:
        items["buckets"] = min(num_trained, REDUCE_BUCKET) * element_bytes
    saved_elements = dims.num_layers * dims.saved_per_token
    if learner.activation_checkpointing:
        # Every layer's input, and everything of the layer that is recomputed.
        saved_elements = dims.num_layers * dims.hidden + dims.saved_per_token
    return items | {
        "activations": float(learner.tokens_per_micro_batch * saved_elements * element_bytes),
        "logits": 2 * learner.logits_mib * 2**20,
        "overhead": OVERHEAD,
    }


def engine_memory(
    dims: ModelDims, element_bytes: int, tensor_parallel_size: int, tokens_with_logits: int, context: int
) -> dict[str, float]:
    """Return the bytes of each item on an engine's device, for one sequence of `context` tokens and logits of
    `tokens_with_logits` tokens at once, in float32 and again as log-probs."""
    return {
        "weights": dims.num_parameters * element_bytes / tensor_parallel_size,
        "logits": 2.0 * 4 * tokens_with_logits * dims.vocabulary / tensor_parallel_size,
        "one sequence": context * 2 * dims.num_layers * dims.keys * element_bytes / tensor_parallel_size,
        "overhead": ENGINE_OVERHEAD,
    }


def store_memory(dims: ModelDims, element_bytes: int, ranks_on_node: int, num_ranks: int) -> float:
    """Return the object store's bytes on a node with `ranks_on_node` ranks, or with engines if 0: at most two versions
    of the weights are alive."""
    share = ranks_on_node / num_ranks if ranks_on_node else 1.0
    return 2 * dims.num_parameters * element_bytes * share
