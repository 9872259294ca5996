"""Memory formulas against what PyTorch keeps, against sums done by hand, and in proportion."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from pear_ray.train.memory import GIB, ModelDims, Training, of_engine, of_rank, of_store

QWEN3_8B = ModelDims(8_190_735_360, 36, 4096, 12288, 4096, 1024, 151_936)
EIGHT = Training(
    num_ranks=8,
    zero_stage=3,
    num_trainable=QWEN3_8B.num_parameters,
    tokens_per_micro_batch=16_384,
    checkpoints_activations=True,
    logits_bytes=512 * 2**20,
)


def kept_elements(num_layers: int, checkpoints: bool, num_tokens: int = 64) -> float:
    """Elements per token that a real decoder keeps for its backward pass, by counting."""
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
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(
            input_ids=torch.zeros(1, num_tokens, dtype=torch.long), use_cache=False
        )
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del hidden
    return num_bytes / num_tokens / 2


@pytest.mark.parametrize(("checkpoints", "expected"), [(False, None), (True, 128.0)])
def test_what_a_layer_keeps(checkpoints: bool, expected: float | None) -> None:
    layer = kept_elements(3, checkpoints) - kept_elements(2, checkpoints)
    shape = ModelDims(0, 3, 128, 320, 6 * 32, 2 * 32, 50)
    assert layer == pytest.approx(expected or shape.saved_per_token, rel=0.03)


def test_a_rank_of_qwen3_8b_by_hand() -> None:
    items = of_rank(QWEN3_8B, 2, EIGHT)
    share = 8_190_735_360 / 8
    assert items["weights"] == items["gradients"] == 2 * share
    assert items["optimizer"] == 12 * share
    assert items["activations"] == 2 * 16_384 * (36 * 4096 + 8 * 4096 + 4 * 12288 + 5 * 5120)
    assert 30 < sum(items.values()) / GIB < 40


def test_an_engine_of_qwen3_8b_by_hand() -> None:
    items = of_engine(QWEN3_8B, 2, tensor_parallel_size=2, tokens_with_logits=256, context=8192)
    assert items["weights"] == 8_190_735_360
    # 147,456 bytes for each token: 2 x 36 layers x 8 heads of 128 x 2 bytes.
    assert items["one sequence"] == 8192 * 147_456 / 2
    assert of_store(QWEN3_8B, 2, 0, 8) == 4 * 8_190_735_360
    assert of_store(QWEN3_8B, 2, 4, 8) == 2 * 8_190_735_360


@given(
    stage=st.sampled_from([0, 1, 2, 3]),
    num_ranks=st.sampled_from([1, 2, 8, 64]),
    element_bytes=st.sampled_from([2, 4]),
)
def test_what_is_partitioned_over_more_ranks_is_never_more(
    stage: int, num_ranks: int, element_bytes: int
) -> None:
    one = replace(EIGHT, zero_stage=stage, num_ranks=num_ranks)
    more = of_rank(QWEN3_8B, element_bytes, replace(one, num_ranks=2 * num_ranks))
    items = of_rank(QWEN3_8B, element_bytes, one)
    assert all(more[name] <= size for name, size in items.items())
    halved = {name for name, size in items.items() if more[name] == size / 2 and size}
    expected = ["optimizer", "gradients", "weights"][:stage]
    assert set(expected) <= halved


@given(stage=st.sampled_from([1, 2, 3]))
def test_offloading_leaves_the_device_less(stage: int) -> None:
    stays = of_rank(QWEN3_8B, 2, replace(EIGHT, zero_stage=stage))
    leaves = of_rank(QWEN3_8B, 2, replace(EIGHT, zero_stage=stage, offloads_optimizer=True))
    assert stays["optimizer"] > leaves["optimizer"] == 0
    assert sum(leaves.values()) < sum(stays.values())
