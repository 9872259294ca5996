"""Deltas between versions: lossless, small, and never applied to a wrong base."""

from __future__ import annotations

import time

import numpy as np
import pytest
import ray
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pear_ray.weights.fetch import WeightCache
from pear_ray.weights.publish import Delta, apply_delta, compute_delta
from pear_ray.weights.registry import WeightVersion
from tests.weights.ranks import Ranks, assert_equal_bits, partitions, random_bits, with_bucket, with_changes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ANY_SIZE = 2**62
uses_store = pytest.mark.usefixtures("ray_session")


def reference_delta(old, new):
    """Return the parts of the delta, computed element by element."""
    counts = [0] * -(-len(new) // 65_536)
    offsets, values = [], []
    for index, (before, after) in enumerate(zip(old.tolist(), new.tolist(), strict=True)):
        if before != after:
            counts[index // 65_536] += 1
            offsets.append(index % 65_536)
            values.append(after)
    return counts, offsets, values


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.one_of(st.integers(0, 300), st.sampled_from((65_535, 65_536, 65_537, 131_072, 131_073))),
    share=st.sampled_from((0.0, 0.001, 0.02, 0.5, 1.0)),
    dtype=st.sampled_from((np.uint8, np.uint16, np.uint32, np.uint64)),
)
@example(seed=0, length=65_536, share=1.0, dtype=np.uint16)
@example(seed=0, length=65_537, share=1.0, dtype=np.uint32)
def test_delta_holds_exactly_the_changed_elements(seed, length, share, dtype):
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 2**8, length).astype(dtype)
    new = np.where(rng.random(length) < share, old ^ 1, old).astype(dtype)
    delta = compute_delta(old, new, ANY_SIZE)
    assert tuple(part.tolist() for part in delta) == reference_delta(old, new)
    assert [part.dtype for part in delta] == [np.uint32, np.uint16, dtype]
    num_changed = np.count_nonzero(old != new)
    assert delta.nbytes == 4 * -(-length // 65_536) + (2 + new.itemsize) * num_changed
    apply_delta(delta, old)
    assert np.array_equal(old, new)


@pytest.mark.parametrize("num_changed", [0, 1, 70_000])
def test_a_delta_above_max_bytes_is_none(num_changed):
    old, new = np.zeros(100_000, np.uint16), np.zeros(100_000, np.uint16)
    new[:num_changed] = 7
    size = 8 + 4 * num_changed
    assert compute_delta(old, new, size) is not None
    assert compute_delta(old, new, size - 1) is None


INCONSISTENT = {
    "counts": (([2], [0], [9]), "delta: expected 2 offsets, got 1"),
    "offsets": (([1], [5], [9]), "delta: expected indices below 5, got 5"),
    "blocks": (([0, 1], [0], [9]), "delta: expected indices below 5, got 65536"),
    "values": (([1], [0], [9, 9]), None),
}


@pytest.mark.parametrize(("parts", "message"), INCONSISTENT.values(), ids=INCONSISTENT)
def test_an_inconsistent_delta_is_refused(parts, message):
    dtypes = (np.uint32, np.uint16, np.uint16)
    delta = Delta(*(np.array(part, dtype) for part, dtype in zip(parts, dtypes, strict=True)))
    with pytest.raises(ValueError) as caught:
        apply_delta(delta, np.zeros(5, np.uint16))
    assert message is None or str(caught.value) == message


@uses_store
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.one_of(st.integers(1, 300), st.sampled_from((65_535, 65_536, 65_537))), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    num_ranks=st.integers(1, 4),
    shares=st.lists(st.sampled_from((0.0, 0.001, 0.02, 0.2, 1.0)), min_size=1, max_size=5),
)
def test_deltas_arrive_bit_by_bit(seed, sizes, dtype, num_ranks, shares):
    rng = np.random.default_rng(seed)
    whole = {str(n): random_bits(rng, (size,), dtype) for n, size in enumerate(sizes)}
    ranks, cache = Ranks(num_ranks, full_every=100), WeightCache()
    assert_equal_bits(cache.fetch(ranks.publish(whole, 0), 30), whole)
    for version, share in enumerate(shares, 1):
        whole = {name: with_changes(rng, tensor, share) for name, tensor in whole.items()}
        assert_equal_bits(cache.fetch(ranks.publish(whole, version), 30), whole)


@uses_store
def test_signs_of_zero_and_nan_payloads_count_as_changes():
    halves = [[0x0000, 0x7FC0, 0x3F80], [0x8000, 0x7FC1, 0x3F80], [0x8000, 0xFFC1, 0x3F80]]
    ranks, cache = Ranks(1, full_every=100), WeightCache()
    for version, values in enumerate(halves):
        # Among a thousand unchanged elements: a larger delta would become a full bucket.
        bits = torch.tensor(values + [0] * 1000, dtype=torch.uint16)
        whole = {"weight": bits.view(torch.bfloat16)}
        assert_equal_bits(cache.fetch(ranks.publish(whole, version), 30), whole)
        assert ranks.shards[0].base_version == (version - 1 if version else None)


def model(seed=0, size=200_000, dtype=torch.bfloat16):
    rng = np.random.default_rng(seed)
    return {"a": random_bits(rng, (size // 2, 2), dtype), "b": random_bits(rng, (77,), dtype)}


def versions(count, share=0.02, start=0):
    """Yield (version, parameters), each with a share of the elements changed."""
    whole = model(start)
    for number in range(start, start + count):
        yield number, whole
        rng = np.random.default_rng(number)
        whole = {name: with_changes(rng, tensor, share) for name, tensor in whole.items()}


@uses_store
def test_thirty_deltas_accumulate_exactly():
    ranks, cache = Ranks(2, full_every=100), WeightCache()
    for number, whole in versions(31):
        found = cache.fetch(ranks.publish(whole, number), 30)
        assert {shard.base_version for shard in ranks.shards} == {number - 1 if number else None}
    assert_equal_bits(found, whole)
    assert_equal_bits(WeightCache().fetch(ranks.publish(whole, 31, full=True), 30), whole)


@uses_store
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_delta_of_two_percent_takes_at_most_a_tenth_of_the_bytes(dtype):
    rng = np.random.default_rng(0)
    whole = {"a": random_bits(rng, (1000, 1000), dtype)}
    ranks = Ranks(2, full_every=100)
    sizes = []
    for number in range(2):
        ranks.publish(whole, number)
        sizes.append(sum(shard.num_bytes for shard in ranks.shards))
        whole = {"a": with_changes(rng, whole["a"], 0.02)}
    assert sizes[0] == 1_000_000 * dtype.itemsize
    assert sizes[1] <= sizes[0] / 10


@uses_store
def test_a_bucket_that_changed_everywhere_is_full_beside_deltas():
    # Each partition fills one bucket; only those of rank 1 change everywhere.
    rng = np.random.default_rng(0)
    small = {name: random_bits(rng, (600_000,), torch.bfloat16) for name in "abc"}
    ranks, cache = Ranks(2, full_every=100), WeightCache()
    cache.fetch(ranks.publish(small, 0), 30)
    half = small["b"].clone()
    half[300_000:] = with_changes(rng, half[300_000:], 1.0)
    whole = {"a": with_changes(rng, small["a"], 0.01), "b": half, "c": small["c"]}
    version = ranks.publish(whole, 1)
    assert_equal_bits(cache.fetch(version, 30), whole)
    assert [bucket.base_version for bucket in version.buckets] == [0, 0, 0, 0, None, 0]
    assert [shard.base_version for shard in ranks.shards] == [0, 0]


SCHEDULES = {
    "every third is full": (3, range(8), set(), [None, 0, 1, None, 3, 4, None, 6]),
    "all are full": (1, range(3), set(), [None, None, None]),
    "full on request, and at multiples": (3, range(7), {2}, [None, 0, None, None, 3, 4, None]),
    "a start between multiples": (3, range(4, 8), set(), [None, 4, None, 6]),
    "skipped versions": (4, [0, 3, 5, 7, 12], set(), [None, 0, None, 5, None]),
    "repeated and older versions": (9, [4, 5, 5, 6, 2, 3], set(), [None, 4, None, 5, None, 2]),
}


@uses_store
@pytest.mark.parametrize(("full_every", "numbers", "requested", "bases"), SCHEDULES.values(), ids=SCHEDULES)
def test_which_versions_are_full(full_every, numbers, requested, bases):
    ranks, cache, whole = Ranks(2, full_every=full_every), WeightCache(), model()
    found = []
    for number in numbers:
        version = ranks.publish(whole, number, full=number in requested)
        assert_equal_bits(cache.fetch(version, 30), whole)
        assert len({shard.base_version for shard in ranks.shards}) == 1
        found.append(ranks.shards[0].base_version)
    assert found == bases


@uses_store
def test_ranks_with_different_requests_agree_again_at_a_multiple():
    ranks, cache = Ranks(2, full_every=3), WeightCache()
    bases = []
    for number, whole in versions(5):
        shards = [
            publisher.publish(partitions(whole, rank, 2), number, full=(number, rank) == (1, 0))
            for rank, publisher in enumerate(ranks.publishers)
        ]
        assert_equal_bits(cache.fetch(WeightVersion.of(shards), 30), whole)
        bases.append([shard.base_version for shard in shards])
    assert bases == [[None, None], [None, 0], [1, 1], [None, None], [3, 3]]


@uses_store
def test_after_a_failed_publish_the_next_version_is_full():
    (_, first), (_, second), (_, third) = versions(3)
    ranks, cache = Ranks(1, full_every=100), WeightCache()
    cache.fetch(ranks.publish(first, 0), 30)

    def broken():
        yield from partitions(second, 0, 1)
        raise OSError("the disk of the offloaded parameters has gone")

    with pytest.raises(OSError, match="has gone"):
        ranks.publishers[0].publish(broken(), 1)
    version = ranks.publish(third, 2)
    assert ranks.shards[0].base_version is None
    assert_equal_bits(cache.fetch(version, 30), third)


BASE_MISSING = "weights version {}, rank 0, bucket 0: expected cached version {}, got {}"


@uses_store
def test_a_missed_delta_raises_and_a_full_version_recovers():
    ranks, cache = Ranks(2, full_every=100), WeightCache()
    published = [(ranks.publish(whole, number), whole) for number, whole in versions(4)]
    cache.fetch(published[0][0], 30)
    for number, base, holds in ((2, 1, "version 0"), (1, 0, "none"), (2, 1, "none")):
        with pytest.raises(RuntimeError) as caught:
            cache.fetch(published[number][0], 30)
        assert str(caught.value) == BASE_MISSING.format(number, base, holds)
    whole = published[3][1]
    assert_equal_bits(cache.fetch(ranks.publish(whole, 4, full=True), 30), whole)
    assert_equal_bits(cache.fetch(ranks.publish(whole, 5), 30), whole)
    assert ranks.shards[0].base_version == 4


@uses_store
@pytest.mark.parametrize("part", Delta._fields)
def test_a_corrupt_delta_is_refused_and_empties_the_cache(part):
    ranks, cache = Ranks(2, full_every=100), WeightCache()
    (first, second) = versions(2)
    cache.fetch(ranks.publish(first[1], 0), 30)
    version = ranks.publish(second[1], 1)
    items = [Delta(*(array.copy() for array in item)) for item in ray.get(reference_of(version, 1))]
    getattr(items[0], part)[0] ^= 1
    damaged = with_bucket(version, 1, reference=[ray.put(items)])
    with pytest.raises(ValueError, match=r"^weights version 1, rank 1, bucket 1: "):
        cache.fetch(damaged, 30)
    with pytest.raises(RuntimeError, match="got none"):
        cache.fetch(version, 30)


@uses_store
def test_a_base_of_the_same_version_with_other_bytes_is_refused():
    """Learners that resumed from a checkpoint may reach other weights at the same step."""
    cache = WeightCache()
    before, after = Ranks(1, full_every=100), Ranks(1, full_every=100)
    cache.fetch(before.publish(model(seed=1), 5), 30)
    whole = model(seed=2)
    after.publish(whole, 5)
    delta = after.publish(
        {name: with_changes(np.random.default_rng(0), tensor, 0.02) for name, tensor in whole.items()}, 6
    )
    with pytest.raises(ValueError) as caught:
        cache.fetch(delta, 30)
    message = "weights version 6, rank 0, bucket 0: checksum differs from the published one"
    assert str(caught.value) == message


@ray.remote(num_cpus=0)
def never():
    time.sleep(3600)


@uses_store
def test_the_cache_survives_a_timeout():
    ranks, cache = Ranks(2, full_every=100), WeightCache()
    (_, first), (_, second) = versions(2)
    cache.fetch(ranks.publish(first, 0), 30)
    version = ranks.publish(second, 1)
    late = never.remote()
    with pytest.raises(TimeoutError, match="rank 1, bucket 1: not fetched within 1 s"):
        cache.fetch(with_bucket(version, 1, reference=[late]), 1)
    ray.cancel(late, force=True)
    assert_equal_bits(cache.fetch(version, 30), second)


def reference_of(version, number):
    return version.buckets[number].reference[0]
