"""Publish and fetch the partitions of several ranks, with and without failures."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.weights.fetch import WeightCache
from pear_ray.weights.publish import Publisher, checksum
from tests.weights.ranks import Ranks, assert_equal_bits, partitions, random_bits, with_bucket

pytestmark = pytest.mark.usefixtures("ray_session")

# Odd sizes, a single element, more than one bucket, and fewer elements than ranks.
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
RANK_MISSING = "weights version 5: embed.weight: expected partitions of ranks [0, 1, 2], got {}"


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(DTYPES[number % len(DTYPES)])
        for number, (name, shape) in enumerate(SHAPES.items())
    }


@pytest.mark.parametrize(
    ("num_ranks", "bucket_mib", "full_every"), [(1, 1, 1), (1, 512, 2), (2, 1, 2), (2, 512, 1), (3, 1, 1), (3, 512, 2)]
)
def test_fetched_weights_equal_the_published_ones(num_ranks, bucket_mib, full_every):
    whole = tensors(num_ranks)
    version = Ranks(num_ranks, bucket_mib, full_every).publish(whole, 5)
    num_buckets = len(version.buckets) / num_ranks
    assert num_buckets == 1 if bucket_mib == 512 else num_buckets > 1
    assert_equal_bits(WeightCache().fetch(version, 30), whole)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shapes=st.lists(st.lists(st.integers(1, 40), max_size=3), min_size=1, max_size=6),
    num_ranks=st.integers(1, 4),
    full_every=st.integers(1, 2),
)
def test_random_tensors_arrive_bit_by_bit(seed, shapes, num_ranks, full_every):
    rng = np.random.default_rng(seed)
    whole = {
        str(number): random_bits(rng, tuple(shape), DTYPES[rng.integers(len(DTYPES))])
        for number, shape in enumerate(shapes)
    }
    version = Ranks(num_ranks, full_every=full_every).publish(whole, 0)
    assert_equal_bits(WeightCache().fetch(version, 30), whole)


def test_other_dtypes_and_special_values_arrive():
    whole = {
        "nan": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.bfloat16),
        "double": torch.linspace(0, 1, 11, dtype=torch.float64),
        "count": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
        "none": torch.empty(0, 3),
    }
    for num_ranks in (1, 2):
        assert_equal_bits(WeightCache().fetch(Ranks(num_ranks).publish(whole, 0), 30), whole)


def test_buckets_stay_below_bucket_mib_unless_one_partition_exceeds_it():
    ranks = Ranks(2)
    version = ranks.publish(tensors(0), 5)
    total = 0
    for bucket in version.buckets:
        size = sum(entry.num_bytes for entry in bucket.params)
        assert sum(item.nbytes for item in ray.get(bucket.reference[0])) == size
        assert size <= 2**20 or len(bucket.params) == 1
        total += size
    assert sum(shard.num_bytes for shard in ranks.shards) == total


def test_buckets_may_come_in_any_order():
    whole = tensors(1)
    version = Ranks(3).publish(whole, 5)
    backwards = dataclasses.replace(version, buckets=version.buckets[::-1])
    assert_equal_bits(WeightCache().fetch(backwards, 30), whole)


def test_one_rank_without_deltas_is_not_copied():
    version = Ranks(1).publish(tensors(1), 5)
    found = WeightCache().fetch(version, 30)
    stored = [item for bucket in version.buckets for item in ray.get(bucket.reference[0])]
    assert [tensor.data_ptr() for tensor in found.values()] == [i.ctypes.data for i in stored]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_cache_for_deltas_reuses_its_memory(num_ranks):
    ranks, cache = Ranks(num_ranks, full_every=2), WeightCache()
    pointers = [
        [tensor.data_ptr() for tensor in cache.fetch(ranks.publish(tensors(n), n), 30).values()] for n in range(3)
    ]
    assert pointers[0] == pointers[1] == pointers[2]


def test_the_number_of_ranks_may_change():
    cache = WeightCache()
    for version, num_ranks in enumerate((2, 3, 1)):
        whole = tensors(num_ranks)
        found = cache.fetch(Ranks(num_ranks, full_every=2).publish(whole, version), 30)
        assert_equal_bits(found, whole)


def test_later_changes_do_not_reach_a_published_version():
    whole = {"weight": torch.zeros(1000, dtype=torch.bfloat16)}
    shards = [Publisher(0, 1, every).publish(partitions(whole, 0, 1), 0) for every in (1, 2)]
    whole["weight"] += 1
    for shard in shards:
        assert not ray.get(shard.buckets[0].reference[0])[0].any()


@pytest.mark.parametrize("full_every", [1, 2])
def test_a_flipped_bit_is_refused(full_every):
    version = Ranks(2, full_every=full_every).publish(tensors(2), 5)
    number = len(version.buckets) - 1
    items = [item.copy() for item in ray.get(version.buckets[number].reference[0])]
    items[-1][len(items[-1]) // 2] ^= 1
    damaged = with_bucket(version, number, reference=[ray.put(items)])
    message = f"weights version 5, rank 1, bucket {number}: checksum differs from the published one"
    with pytest.raises(ValueError) as caught:
        WeightCache().fetch(damaged, 30)
    assert str(caught.value) == message


def test_a_truncated_object_is_refused():
    version = Ranks(2).publish(tensors(2), 5)
    for change in (lambda items: items[:-1], lambda items: [*items[:-1], items[-1][:-1]]):
        items = change(ray.get(version.buckets[0].reference[0]))
        with pytest.raises(ValueError, match=r"^weights version 5, rank 0, bucket 0: "):
            WeightCache().fetch(with_bucket(version, 0, reference=[ray.put(items)]), 30)


def test_a_missing_rank_is_refused():
    version = Ranks(3, 512).publish(tensors(3), 5)
    for absent in range(3):
        kept = tuple(bucket for bucket in version.buckets if bucket.rank != absent)
        with pytest.raises(ValueError) as caught:
            WeightCache().fetch(dataclasses.replace(version, buckets=kept), 30)
        left = [rank for rank in range(3) if rank != absent]
        assert str(caught.value) == RANK_MISSING.format(left)


def test_checksum_covers_the_concatenated_bytes():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, size, np.uint8) for size in (0, 1, 1000, 70_000)]
    joined = np.concatenate(arrays)
    assert checksum(arrays) == checksum([joined])
    assert checksum([]) == 0x2D06800538D394C2  # XXH3 of empty input, from its specification
    joined[500] ^= 1
    assert checksum(arrays) != checksum([joined])


@ray.remote(num_cpus=0)
class Learner:
    """Publishes from a process of its own; its objects are lost when it dies."""

    def publish(self, whole):
        return Ranks(1).publish(whole, 5)

    def never(self):
        time.sleep(3600)


def test_a_missing_bucket_raises_at_the_timeout():
    learner = Learner.remote()
    version = ray.get(learner.publish.remote(tensors(4)))
    late = with_bucket(version, 1, reference=[learner.never.remote()])
    # Waiting for the other buckets does not extend the timeout.
    started = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        WeightCache().fetch(late, 1)
    assert str(caught.value) == "weights version 5, rank 0, bucket 1: not fetched within 1 s"
    assert time.monotonic() - started < 5
    ray.kill(learner)


def test_a_bucket_of_a_dead_publisher_raises():
    learner = Learner.remote()
    version = ray.get(learner.publish.remote(tensors(5)))
    ray.kill(learner)
    end = time.monotonic() + 60
    with pytest.raises(LookupError, match=r"version 5, rank 0, bucket \d: lost from the store"):
        # Ray needs a moment to notice the death; until then the objects are available.
        while time.monotonic() < end:
            WeightCache().fetch(version, 60)
