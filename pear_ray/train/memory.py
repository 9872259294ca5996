"""Memory of a rank, of an engine and of a node's object store, in bytes, item by item.

What a rank holds follows from ZeRO (arXiv 1910.02054, section 3: 16 bytes per parameter in mixed
precision, partitioned by stage) and from DeepSpeed's default buckets. What its layers keep for the
backward pass was counted with hooks on saved tensors, for gated MLPs and an attention that does not
keep its scores (tests/test_plan_memory.py). Of an engine the key-value cache is what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30
# DeepSpeed's defaults: parameters that are gathered at once, and fetched ahead; gradients that are
# reduced at once; parameters that the optimizer steps over at once.
MAX_LIVE, PREFETCH, REDUCE_BUCKET, SUB_GROUP = 10**9, 5 * 10**7, 5 * 10**8, 10**9
# Context, communication, and what PyTorch's allocator cannot use.
OVERHEAD = 3 * GIB
# What a learner keeps while another one on its device works; gathered parameters, a step's own and
# activations are there for one of them at a time.
AT_REST = ("weights", "gradients", "optimizer", "buckets")
# What a step keeps of an element that it may put back: values from before and from between two
# updates, in float32, and whether it does.
HELD = 4 + 4 + 1
# vLLM's own, beside weights, cache and logits: CUDA graphs, context.
ENGINE_OVERHEAD = 2 * GIB


@dataclass(frozen=True)
class ModelDims:
    """What of a decoder decides its memory. Example: Shape(8_190_735_360, 36, 4096, 12288, 4096,
    1024, 151_936) is Qwen3-8B in full."""

    num_parameters: int
    num_layers: int
    hidden: int
    intermediate: int
    queries: int
    """Query heads times their width."""
    keys: int
    """Key heads times their width; values are as many."""
    vocabulary: int

    @property
    def saved_per_token(self) -> int:
        """Elements that a layer keeps of each token for the backward pass."""
        return 8 * self.hidden + 4 * self.intermediate + 5 * self.queries + 5 * self.keys

    def cache_per_token(self, element_bytes: int) -> int:
        """Bytes of the key-value cache for each token."""
        return 2 * self.num_layers * self.keys * element_bytes


@dataclass(frozen=True)
class Training:
    """How ranks are set up; `num_trainable` is less than all parameters with adapters."""

    num_ranks: int
    zero_stage: int
    num_trainable: int
    tokens_per_micro_batch: int
    checkpoints_activations: bool
    logits_bytes: float
    offloads_optimizer: bool = False
    offloads_parameters: bool = False


def of_rank(shape: ModelDims, element_bytes: int, how: Training) -> dict[str, float]:
    """Bytes on the device of one rank, by item."""
    parts_of = [1 if how.zero_stage < stage else how.num_ranks for stage in (3, 2, 1)]
    of_weights, of_gradients, of_states = parts_of
    trained, is_partitioned = how.num_trainable, how.zero_stage > 0
    keeps_master = element_bytes == 2 or is_partitioned
    states = (12 if keeps_master else 8) * trained / of_states
    weights = shape.num_parameters * element_bytes / of_weights
    items = {
        "weights": 0.0 if how.offloads_parameters else weights,
        "gradients": trained * element_bytes / of_gradients,
        "optimizer": 0.0 if how.offloads_optimizer else states,
        "step": 0.0 if how.offloads_optimizer else 4.0 * min(trained / of_states, SUB_GROUP),
    }
    if how.zero_stage == 3:
        items["gathered"] = (min(shape.num_parameters, MAX_LIVE) + PREFETCH) * element_bytes
    if is_partitioned:
        items["buckets"] = min(trained, REDUCE_BUCKET) * element_bytes
    return items | {
        "activations": activations(shape, element_bytes, how),
        "logits": 2 * how.logits_bytes,
        "overhead": OVERHEAD,
    }


def at_rest(items: Mapping[str, float]) -> float:
    """Bytes of a second learner beside one that works, of the items of `of_rank`."""
    return sum(items.get(name, 0.0) for name in AT_REST)


def activations(shape: ModelDims, element_bytes: int, how: Training) -> float:
    """What is kept of a micro-batch: everything, or the layers' inputs and one layer's rest."""
    layer = shape.saved_per_token
    per_token = shape.num_layers * layer
    if how.checkpoints_activations:
        per_token = shape.num_layers * shape.hidden + layer
    return float(how.tokens_per_micro_batch * per_token * element_bytes)


def of_engine(
    shape: ModelDims,
    element_bytes: int,
    tensor_parallel_size: int,
    tokens_with_logits: int,
    context: int,
) -> dict[str, float]:
    """Bytes on each device of an engine that holds one sequence of `context` tokens and makes
    logits, in float32 and once more as log-probs, for so many tokens at once."""
    return {
        "weights": shape.num_parameters * element_bytes / tensor_parallel_size,
        "logits": 2.0 * 4 * tokens_with_logits * shape.vocabulary / tensor_parallel_size,
        "one sequence": context * shape.cache_per_token(element_bytes) / tensor_parallel_size,
        "overhead": ENGINE_OVERHEAD,
    }


def of_store(shape: ModelDims, element_bytes: int, ranks_on_node: int, num_ranks: int) -> float:
    """Bytes in the object store of a node with so many of the ranks, or, where it has none, with
    engines: two versions of the weights are alive at most."""
    share = ranks_on_node / num_ranks if ranks_on_node else 1.0
    return 2 * shape.num_parameters * element_bytes * share
