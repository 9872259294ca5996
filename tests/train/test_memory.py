"""Memory formulas against what PyTorch saves, sums done by hand, and proportions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pear_ray.config import Learner
from pear_ray.train.memory import GIB, ModelDims, engine_memory, rank_memory, store_memory

QWEN3_8B = ModelDims(8_190_735_360, 36, 4096, 12288, 4096, 1024, 151_936)
EIGHT_RANKS = Learner(num_workers=8, tokens_per_micro_batch=16_384, activation_checkpointing=True, logits_mib=512)


def rank_of_8b(element_bytes: int = 2, **changes: Any) -> dict[str, float]:
    learner = EIGHT_RANKS.model_copy(update=changes)
    return rank_memory(QWEN3_8B, element_bytes, learner, QWEN3_8B.num_parameters)


def saved_elements(num_layers: int, checkpoints: bool, num_tokens: int = 64) -> float:
    """Count the elements per token that a real decoder saves for its backward pass."""
    config = Qwen3Config(
        hidden_size=128,
        intermediate_size=320,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_hidden_layers=num_layers,
        vocab_size=50,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16).train()
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            saved[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        hidden = model.model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long), use_cache=False)
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del hidden
    return num_bytes / num_tokens / 2


@pytest.mark.parametrize(("checkpoints", "expected"), [(False, None), (True, 128.0)])
def test_saved_activations_of_a_layer(checkpoints: bool, expected: float | None) -> None:
    layer = saved_elements(3, checkpoints) - saved_elements(2, checkpoints)
    dims = ModelDims(0, 3, 128, 320, 6 * 32, 2 * 32, 50)
    assert layer == pytest.approx(expected or dims.saved_per_token, rel=0.03)


def test_a_rank_of_qwen3_8b_by_hand() -> None:
    items = rank_of_8b()
    share = 8_190_735_360 / 8
    assert items["weights"] == items["gradients"] == 2 * share
    assert items["optimizer"] == 12 * share
    assert items["activations"] == 2 * 16_384 * (36 * 4096 + 8 * 4096 + 4 * 12288 + 5 * 5120)
    assert 30 < sum(items.values()) / GIB < 40


def test_an_engine_of_qwen3_8b_by_hand() -> None:
    items = engine_memory(QWEN3_8B, 2, tensor_parallel_size=2, tokens_with_logits=256, context=8192)
    assert items["weights"] == 8_190_735_360
    # 147,456 bytes per token: 2 x 36 layers x 8 heads of 128 x 2 bytes.
    assert items["one sequence"] == 8192 * 147_456 / 2
    assert store_memory(QWEN3_8B, 2, 0, 8) == 4 * 8_190_735_360
    assert store_memory(QWEN3_8B, 2, 4, 8) == 2 * 8_190_735_360


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("num_ranks", "element_bytes"), [(1, 2), (2, 4), (8, 2), (64, 4)])
def test_twice_the_ranks_halve_what_the_stage_partitions(stage: int, num_ranks: int, element_bytes: int) -> None:
    items = rank_of_8b(element_bytes, zero_stage=stage, num_workers=num_ranks)
    doubled = rank_of_8b(element_bytes, zero_stage=stage, num_workers=2 * num_ranks)
    assert all(doubled[name] <= size for name, size in items.items())
    halved = {name for name, size in items.items() if doubled[name] == size / 2 and size}
    assert set(["optimizer", "gradients", "weights"][:stage]) <= halved


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_frees_device_memory(stage: int) -> None:
    on_device = rank_of_8b(zero_stage=stage)
    offloaded = rank_of_8b(zero_stage=stage, offload="optimizer")
    assert on_device["optimizer"] > offloaded["optimizer"] == 0
    assert sum(offloaded.values()) < sum(on_device.values())
