"""Published adapters, merged on fetch, equal the learner's merged export."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from pear_ray.config import Lora
from pear_ray.errors import ConfigError
from pear_ray.train.model import add_adapters, merged_parameters
from pear_ray.weights.adapters import AdapterCache, adapter_partitions, merge_lora
from pear_ray.weights.publish import Publisher
from pear_ray.weights.registry import WeightVersion
from tests.weights.ranks import assert_equal_bits, bits, partitions

pytestmark = pytest.mark.usefixtures("ray_session")

SETTINGS = Lora(rank=3, alpha=7, targets=("q_proj", "o_proj", "down_proj"))
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapted(tiny_model):
    """Return a start folder and, by dtype, its model with adapters."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model(True)

    def make(dtype):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        add_adapters(model, SETTINGS)
        return model

    return folder, {dtype: make(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def trained(model, seed):
    """Return the parameters with random adapters, as after a few steps."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            drawn = torch.randn(parameter.shape, generator=generator) / 8
            parameter.data.copy_(drawn.to(parameter.dtype))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def published(publishers, whole, version, scaling=SETTINGS.alpha / SETTINGS.rank):
    num_ranks = len(publishers)
    adapters = (adapter_partitions(partitions(whole, rank, num_ranks), scaling) for rank in range(num_ranks))
    return WeightVersion.of(
        [publisher.publish(own, version) for publisher, own in zip(publishers, adapters, strict=True)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_merged_weights_equal_the_export(adapted, dtype, num_ranks):
    folder, models = adapted
    base = load_file(folder / "model.safetensors")
    cache = AdapterCache(str(folder))
    publishers = [Publisher(rank, 1, full_every=2) for rank in range(num_ranks)]
    for version in range(3):
        whole = trained(models[dtype], version)
        found = cache.fetch(published(publishers, whole, version), 30)
        assert cache.version == version
        exported = {name: made().detach() for name, _, made in merged_parameters(models[dtype])}
        assert_equal_bits(found, exported)
        changed = {n for n in found if not torch.equal(found[n], base[n].to(dtype))}
        assert len(changed) == 6


def test_only_adapters_are_published(adapted):
    _, models = adapted
    whole = trained(models[torch.float32], 0)
    version = published([Publisher(0, 1, 1)], whole, 0)
    names = [entry.name for bucket in version.buckets for entry in bucket.params]
    assert names == [name for name in whole if ".lora_" in name] + ["lora_scaling"]
    assert len(names) == 13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_lora_matches_elementwise_sums(dtype):
    draw = torch.Generator().manual_seed(0)
    base, lora_A, lora_B = (torch.randn(shape, generator=draw).to(dtype) for shape in ((4, 5), (2, 5), (4, 2)))
    found = merge_lora(base, lora_A, lora_B, 0.3)
    # The summands are smaller than 4, and each is rounded.
    assert max(part.abs().max() for part in (base, found)) < 4
    bound = 4 * torch.finfo(dtype).eps
    for row in range(4):
        for column in range(5):
            product = sum(float(lora_B[row, r]) * float(lora_A[r, column]) for r in range(2))
            expected = float(base[row, column]) + 0.3 * product
            assert float(found[row, column]) == pytest.approx(expected, abs=bound)
    assert found.dtype == dtype
    assert bits(merge_lora(base, lora_A, torch.zeros_like(lora_B), 0.3)).tolist() == bits(base).tolist()


@pytest.fixture
def whole():
    draw = torch.Generator().manual_seed(0)
    return {
        f"{Q}.lora_A.default.weight": torch.randn(2, 5, generator=draw),
        f"{Q}.lora_B.default.weight": torch.randn(4, 2, generator=draw),
    }


def folder_of(tmp_path, **tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    return str(tmp_path)


def test_base_weights_may_be_in_any_file_of_the_folder(tmp_path, whole):
    base = torch.randn(4, 5)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({f"{Q}.weight": base}, tmp_path / "model-00002-of-00002.safetensors")
    found = AdapterCache(str(tmp_path)).fetch(published([Publisher(0, 1, 1)], whole, 4, 0.5), 30)
    A, B = whole.values()
    assert found.keys() == {f"{Q}.weight", "other"}
    torch.testing.assert_close(found[f"{Q}.weight"], base + 0.5 * B @ A)


@pytest.mark.parametrize(("shapes", "got"), [({"other": (4, 5)}, None), ({f"{Q}.weight": (5, 4)}, (5, 4))])
def test_a_missing_or_misshapen_base_weight_is_refused(tmp_path, whole, shapes, got):
    folder = folder_of(tmp_path, **{name: torch.zeros(shape) for name, shape in shapes.items()})
    cache = AdapterCache(str(folder))
    with pytest.raises(ConfigError) as caught:
        cache.fetch(published([Publisher(0, 1, 1)], whole, 4), 30)
    message = f"{folder}: {Q}.weight: expected shape (4, 5) of its adapter, got {got}"
    assert str(caught.value) == message


def test_a_folder_without_weights_is_refused(tmp_path):
    message = f"{tmp_path}: expected *.safetensors files of the start model, got none"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        AdapterCache(str(tmp_path))


@pytest.mark.parametrize(("lost", "kept"), [("A", "B"), ("B", "A")])
def test_half_an_adapter_is_refused(tmp_path, whole, lost, kept):
    del whole[f"{Q}.lora_{lost}.default.weight"]
    cache = AdapterCache(folder_of(tmp_path, **{f"{Q}.weight": torch.zeros(4, 5)}))
    with pytest.raises(ValueError) as caught:
        cache.fetch(published([Publisher(0, 1, 1)], whole, 4), 30)
    message = f"weights version 4: {Q}: expected lora_A and lora_B, got {{'{kept}'}}"
    assert str(caught.value) == message


def test_a_version_without_adapters_is_refused(tmp_path):
    shard = Publisher(0, 1, 1).publish(partitions({"w": torch.zeros(3)}, 0, 1), 4)
    cache = AdapterCache(folder_of(tmp_path, w=torch.zeros(3)))
    with pytest.raises(ValueError) as caught:
        cache.fetch(WeightVersion(4, 1, shard.buckets), 30)
    message = "weights version 4: expected lora_scaling beside adapters, got none"
    assert str(caught.value) == message
