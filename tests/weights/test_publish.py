"""Partitions of several ranks through the object store and back, and what can go wrong."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import ray
import torch

from pear_ray.weights.assemble import fetch
from pear_ray.weights.manifest import WeightVersion
from pear_ray.weights.publish import publish

pytestmark = pytest.mark.usefixtures("ray_session")

# Odd sizes, one element, more than a bucket holds, and less than there are ranks.
SHAPES = {
    "embed.weight": (101, 1031),
    "layer.bias": (7,),
    "layer.scale": (1,),
    "layer.gate": (1, 1, 1),
    "layer.weight": (1200, 1103),
    "norm.weight": (129,),
    "head.weight": (333, 777),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(DTYPES[number % len(DTYPES)])
        for number, (name, shape) in enumerate(SHAPES.items())
    }


def partitions(whole, rank, num_ranks):
    """What ZeRO-3 leaves a rank of every parameter: an equal, padded piece of the flat tensor."""
    for name, tensor in whole.items():
        length = -(-tensor.numel() // num_ranks)
        flat = torch.full((length * num_ranks,), 99, dtype=tensor.dtype)
        flat[: tensor.numel()] = tensor.reshape(-1)
        yield name, tuple(tensor.shape), flat[rank * length :][:length]


def published(whole, num_ranks, bucket_mib, version=5):
    shares = [publish(partitions(whole, r, num_ranks), r, bucket_mib) for r in range(num_ranks)]
    return WeightVersion(version, num_ranks, tuple(bucket for share in shares for bucket in share))


def with_bucket(version, number, **changes):
    buckets = list(version.buckets)
    buckets[number] = dataclasses.replace(buckets[number], **changes)
    return dataclasses.replace(version, buckets=tuple(buckets))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("bucket_mib", [1, 512])
def test_what_is_fetched_is_what_was_published(num_ranks, bucket_mib):
    whole = tensors(num_ranks)
    version = published(whole, num_ranks, bucket_mib)
    num_buckets = len(version.buckets) / num_ranks
    assert num_buckets == 1 if bucket_mib == 512 else num_buckets > 1
    found = fetch(version, 30)
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name


def test_a_bucket_is_no_longer_than_asked_unless_one_partition_is():
    version = published(tensors(0), num_ranks=2, bucket_mib=1)
    for bucket in version.buckets:
        size = sum(entry.num_bytes for entry in bucket.entries)
        assert len(ray.get(bucket.reference[0])) == size
        assert size <= 2**20 or len(bucket.entries) == 1


def test_buckets_may_come_in_any_order_of_ranks():
    whole = tensors(1)
    version = published(whole, num_ranks=3, bucket_mib=1)
    backwards = dataclasses.replace(version, buckets=version.buckets[::-1])
    found = fetch(backwards, 30)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_a_flipped_bit_is_refused():
    version = published(tensors(2), num_ranks=2, bucket_mib=1)
    number = len(version.buckets) - 1
    flat = ray.get(version.buckets[number].reference[0]).copy()
    flat[len(flat) // 2] ^= 1
    damaged = with_bucket(version, number, reference=[ray.put(flat)])
    with pytest.raises(ValueError, match=rf"version 5, rank 1, bucket {number}: checksum"):
        fetch(damaged, 30)


def test_a_missing_rank_is_refused():
    version = published(tensors(3), num_ranks=3, bucket_mib=512)
    for absent in range(3):
        kept = tuple(bucket for bucket in version.buckets if bucket.rank != absent)
        with pytest.raises(ValueError, match=r"version 5: embed.weight lacks a rank's partition"):
            fetch(dataclasses.replace(version, buckets=kept), 30)


@ray.remote(num_cpus=0)
class Learner:
    """Publishes from a process of its own, with which its objects die."""

    def publish(self, whole):
        return published(whole, num_ranks=1, bucket_mib=1)

    def never(self):
        time.sleep(3600)


def test_a_bucket_that_never_comes_ends_the_wait_at_its_deadline():
    learner = Learner.remote()
    version = ray.get(learner.publish.remote(tensors(4)))
    late = with_bucket(version, 1, reference=[learner.never.remote()])
    # The buckets before it do not lengthen the wait.
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"version 5, rank 0, bucket 1: not fetched within 1 s"):
        fetch(late, 1)
    assert time.monotonic() - started < 5
    ray.kill(learner)


def test_a_bucket_whose_publisher_died_is_named():
    learner = Learner.remote()
    version = ray.get(learner.publish.remote(tensors(5)))
    ray.kill(learner)
    end = time.monotonic() + 60
    with pytest.raises(LookupError, match=r"version 5, rank 0, bucket \d: no longer in the store"):
        # The store learns of the death a moment later; until then the version is whole.
        while time.monotonic() < end:
            fetch(version, 60)


def test_every_dtype_keeps_its_bits():
    whole = {
        "nan": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.bfloat16),
        "double": torch.linspace(0, 1, 11, dtype=torch.float64),
        "count": torch.arange(5),
    }
    found = fetch(WeightVersion(0, 1, tuple(publish(partitions(whole, 0, 1), 0, 1))), 30)
    for name, tensor in whole.items():
        assert np.array_equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
