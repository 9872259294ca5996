"""What changed, and nothing else, from version to version: exact, small, and never on a wrong
base."""

from __future__ import annotations

import time

import numpy as np
import pytest
import ray
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pear_ray.weights.delta import Delta, apply, difference
from pear_ray.weights.fetch import BaseMissing, WeightCache
from pear_ray.weights.types import WeightVersion
from tests.weights.ranks import Ranks, assert_same, changed, partitions, random_bits, with_bucket

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ANY_SIZE = 2**62
with_store = pytest.mark.usefixtures("ray_session")


def one_by_one(old, new):
    """The same delta, element by element."""
    counts = [0] * -(-len(new) // 65_536)
    places, values = [], []
    for place, (before, after) in enumerate(zip(old.tolist(), new.tolist(), strict=True)):
        if before != after:
            counts[place // 65_536] += 1
            places.append(place % 65_536)
            values.append(after)
    return counts, places, values


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.one_of(
        st.integers(0, 300), st.sampled_from((65_535, 65_536, 65_537, 131_072, 131_073))
    ),
    share=st.sampled_from((0.0, 0.001, 0.02, 0.5, 1.0)),
    dtype=st.sampled_from((np.uint8, np.uint16, np.uint32, np.uint64)),
)
@example(seed=0, length=65_536, share=1.0, dtype=np.uint16)
@example(seed=0, length=65_537, share=1.0, dtype=np.uint32)
def test_a_delta_is_the_changed_elements(seed, length, share, dtype):
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 2**8, length).astype(dtype)
    new = np.where(rng.random(length) < share, old ^ 1, old).astype(dtype)
    delta = difference(old, new, ANY_SIZE)
    assert tuple(part.tolist() for part in delta) == one_by_one(old, new)
    assert [part.dtype for part in delta] == [np.uint32, np.uint16, dtype]
    num_changed = np.count_nonzero(old != new)
    assert delta.nbytes == 4 * -(-length // 65_536) + (2 + new.itemsize) * num_changed
    apply(delta, old)
    assert np.array_equal(old, new)


@pytest.mark.parametrize("num_changed", [0, 1, 70_000])
def test_a_delta_of_more_bytes_than_allowed_is_none(num_changed):
    old, new = np.zeros(100_000, np.uint16), np.zeros(100_000, np.uint16)
    new[:num_changed] = 7
    size = 8 + 4 * num_changed
    assert difference(old, new, size) is not None
    assert difference(old, new, size - 1) is None


CONTRADICTIONS = {
    "counts": (([2], [0], [9]), "2 elements changed, at 1 places"),
    "places": (([1], [5], [9]), "element 5 changed, of 5"),
    "blocks": (([0, 1], [0], [9]), "element 65536 changed, of 5"),
    "values": (([1], [0], [9, 9]), None),
}


@pytest.mark.parametrize(("parts", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_delta_that_contradicts_itself_is_refused(parts, message):
    dtypes = (np.uint32, np.uint16, np.uint16)
    delta = Delta(*(np.array(part, dtype) for part, dtype in zip(parts, dtypes, strict=True)))
    with pytest.raises(ValueError) as caught:
        apply(delta, np.zeros(5, np.uint16))
    assert message is None or str(caught.value) == message


@with_store
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(
        st.one_of(st.integers(1, 300), st.sampled_from((65_535, 65_536, 65_537))),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from(DTYPES),
    num_ranks=st.integers(1, 4),
    shares=st.lists(st.sampled_from((0.0, 0.001, 0.02, 0.2, 1.0)), min_size=1, max_size=5),
)
def test_every_bit_arrives_whatever_changed(seed, sizes, dtype, num_ranks, shares):
    rng = np.random.default_rng(seed)
    whole = {str(n): random_bits(rng, (size,), dtype) for n, size in enumerate(sizes)}
    ranks, replica = Ranks(num_ranks, full_every=100), WeightCache()
    assert_same(replica.fetch(ranks.publish(whole, 0), 30), whole)
    for version, share in enumerate(shares, 1):
        whole = {name: changed(rng, tensor, share) for name, tensor in whole.items()}
        assert_same(replica.fetch(ranks.publish(whole, version), 30), whole)


@with_store
def test_zeros_and_nans_that_differ_in_bits_alone_are_changes():
    halves = [[0x0000, 0x7FC0, 0x3F80], [0x8000, 0x7FC1, 0x3F80], [0x8000, 0xFFC1, 0x3F80]]
    ranks, replica = Ranks(1, full_every=100), WeightCache()
    for version, values in enumerate(halves):
        # Among many that stay, or the bucket would travel whole.
        bits = torch.tensor(values + [0] * 1000, dtype=torch.uint16)
        whole = {"weight": bits.view(torch.bfloat16)}
        assert_same(replica.fetch(ranks.publish(whole, version), 30), whole)
        assert ranks.shares[0].base_version == (version - 1 if version else None)


def model(seed=0, size=200_000, dtype=torch.bfloat16):
    rng = np.random.default_rng(seed)
    return {"a": random_bits(rng, (size // 2, 2), dtype), "b": random_bits(rng, (77,), dtype)}


def versions(count, share=0.02, start=0):
    """A model, and what becomes of it."""
    whole = model(start)
    for number in range(start, start + count):
        yield number, whole
        rng = np.random.default_rng(number)
        whole = {name: changed(rng, tensor, share) for name, tensor in whole.items()}


@with_store
def test_thirty_deltas_are_a_full_version():
    ranks, replica = Ranks(2, full_every=100), WeightCache()
    for number, whole in versions(31):
        found = replica.fetch(ranks.publish(whole, number), 30)
        assert {share.base_version for share in ranks.shares} == {number - 1 if number else None}
    assert_same(found, whole)
    assert_same(WeightCache().fetch(ranks.publish(whole, 31, full=True), 30), whole)


@with_store
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_changed_elements_in_a_hundred_are_a_tenth_of_the_bytes(dtype):
    rng = np.random.default_rng(0)
    whole = {"a": random_bits(rng, (1000, 1000), dtype)}
    ranks = Ranks(2, full_every=100)
    sizes = []
    for number in range(2):
        ranks.publish(whole, number)
        sizes.append(sum(share.num_bytes for share in ranks.shares))
        whole = {"a": changed(rng, whole["a"], 0.02)}
    assert sizes[0] == 1_000_000 * dtype.itemsize
    assert sizes[1] <= sizes[0] / 10


@with_store
def test_what_changed_everywhere_travels_whole_beside_deltas():
    # Each partition fills a bucket of its own; rank 1 alone has what changed.
    rng = np.random.default_rng(0)
    small = {name: random_bits(rng, (600_000,), torch.bfloat16) for name in "abc"}
    ranks, replica = Ranks(2, full_every=100), WeightCache()
    replica.fetch(ranks.publish(small, 0), 30)
    half = small["b"].clone()
    half[300_000:] = changed(rng, half[300_000:], 1.0)
    whole = {"a": changed(rng, small["a"], 0.01), "b": half, "c": small["c"]}
    version = ranks.publish(whole, 1)
    assert_same(replica.fetch(version, 30), whole)
    assert [bucket.base_version for bucket in version.buckets] == [0, 0, 0, 0, None, 0]
    assert [share.base_version for share in ranks.shares] == [0, 0]


SCHEDULES = {
    "every third is full": (3, range(8), set(), [None, 0, 1, None, 3, 4, None, 6]),
    "all are full": (1, range(3), set(), [None, None, None]),
    "full when asked, and at multiples": (3, range(7), {2}, [None, 0, None, None, 3, 4, None]),
    "a start between multiples": (3, range(4, 8), set(), [None, 4, None, 6]),
    "versions left out": (4, [0, 3, 5, 7, 12], set(), [None, 0, None, 5, None]),
    "the same again, and an older one": (9, [4, 5, 5, 6, 2, 3], set(), [None, 4, None, 5, None, 2]),
}


@with_store
@pytest.mark.parametrize(
    ("full_every", "numbers", "asked", "bases"), SCHEDULES.values(), ids=SCHEDULES
)
def test_which_versions_are_full(full_every, numbers, asked, bases):
    ranks, replica, whole = Ranks(2, full_every=full_every), WeightCache(), model()
    found = []
    for number in numbers:
        version = ranks.publish(whole, number, full=number in asked)
        assert_same(replica.fetch(version, 30), whole)
        assert len({share.base_version for share in ranks.shares}) == 1
        found.append(ranks.shares[0].base_version)
    assert found == bases


@with_store
def test_ranks_that_were_asked_for_different_things_agree_again():
    ranks, replica = Ranks(2, full_every=3), WeightCache()
    bases = []
    for number, whole in versions(5):
        shares = [
            publisher.publish(partitions(whole, rank, 2), number, full=(number, rank) == (1, 0))
            for rank, publisher in enumerate(ranks.publishers)
        ]
        assert_same(replica.fetch(WeightVersion.of(shares), 30), whole)
        bases.append([share.base_version for share in shares])
    assert bases == [[None, None], [None, 0], [1, 1], [None, None], [3, 3]]


@with_store
def test_after_a_failure_half_way_the_next_version_is_full():
    (_, first), (_, second), (_, third) = versions(3)
    ranks, replica = Ranks(1, full_every=100), WeightCache()
    replica.fetch(ranks.publish(first, 0), 30)

    def broken():
        yield from partitions(second, 0, 1)
        raise OSError("the disk of the offloaded parameters has gone")

    with pytest.raises(OSError, match="has gone"):
        ranks.publishers[0].publish(broken(), 1)
    version = ranks.publish(third, 2)
    assert ranks.shares[0].base_version is None
    assert_same(replica.fetch(version, 30), third)


BASE_MISSING = (
    "weights version {}, rank 0, bucket 0: what changed since version {}; this replica holds {} and"
    " needs a full version"
)


@with_store
def test_a_lost_delta_is_told_and_a_full_version_helps():
    ranks, replica = Ranks(2, full_every=100), WeightCache()
    published = [(ranks.publish(whole, number), whole) for number, whole in versions(4)]
    replica.fetch(published[0][0], 30)
    for number, base, holds in ((2, 1, "version 0"), (1, 0, "none"), (2, 1, "none")):
        with pytest.raises(BaseMissing) as caught:
            replica.fetch(published[number][0], 30)
        assert str(caught.value) == BASE_MISSING.format(number, base, holds)
    whole = published[3][1]
    assert_same(replica.fetch(ranks.publish(whole, 4, full=True), 30), whole)
    assert_same(replica.fetch(ranks.publish(whole, 5), 30), whole)
    assert ranks.shares[0].base_version == 4


@with_store
@pytest.mark.parametrize("part", Delta._fields)
def test_a_flipped_bit_of_a_delta_is_refused_and_the_replica_starts_anew(part):
    ranks, replica = Ranks(2, full_every=100), WeightCache()
    (first, second) = versions(2)
    replica.fetch(ranks.publish(first[1], 0), 30)
    version = ranks.publish(second[1], 1)
    items = [Delta(*(array.copy() for array in item)) for item in ray.get(reference_of(version, 1))]
    getattr(items[0], part)[0] ^= 1
    damaged = with_bucket(version, 1, reference=[ray.put(items)])
    with pytest.raises(ValueError, match=r"^weights version 1, rank 1, bucket 1: "):
        replica.fetch(damaged, 30)
    with pytest.raises(BaseMissing, match="holds none"):
        replica.fetch(version, 30)


@with_store
def test_a_base_of_the_same_number_with_other_bytes_does_not_pass():
    """Learners that went back to a checkpoint need not become what they were before."""
    replica = WeightCache()
    before, after = Ranks(1, full_every=100), Ranks(1, full_every=100)
    replica.fetch(before.publish(model(seed=1), 5), 30)
    whole = model(seed=2)
    after.publish(whole, 5)
    delta = after.publish(
        {name: changed(np.random.default_rng(0), tensor, 0.02) for name, tensor in whole.items()}, 6
    )
    with pytest.raises(ValueError) as caught:
        replica.fetch(delta, 30)
    said = "weights version 6, rank 0, bucket 0: checksum differs from the published one"
    assert str(caught.value) == said


@ray.remote(num_cpus=0)
def never():
    time.sleep(3600)


@with_store
def test_what_is_held_outlives_a_deadline():
    ranks, replica = Ranks(2, full_every=100), WeightCache()
    (_, first), (_, second) = versions(2)
    replica.fetch(ranks.publish(first, 0), 30)
    version = ranks.publish(second, 1)
    late = never.remote()
    with pytest.raises(TimeoutError, match="rank 1, bucket 1: not fetched within 1 s"):
        replica.fetch(with_bucket(version, 1, reference=[late]), 1)
    ray.cancel(late, force=True)
    assert_same(replica.fetch(version, 30), second)


def reference_of(version, number):
    return version.buckets[number].reference[0]
