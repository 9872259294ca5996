"""The registry of policy versions: announcements, waits, restarts, and references it holds."""

from __future__ import annotations

import time

import numpy as np
import pytest
import ray

from pear_ray.data.batch_queue import QueueClosed
from pear_ray.weights.registry import Bucket, PolicyVersions, RankShard

pytestmark = pytest.mark.usefixtures("ray_session")

SHORT, LONG = 0.3, 60.0
MIB = 2**20


def shard(rank, version=0, content=b"", base_version=None):
    """Return one rank's shard, with `content` in its only bucket."""
    reference = [ray.put(np.frombuffer(content, np.uint8))]
    return RankShard(version, rank, (Bucket(reference, rank, 0, (), base_version),), len(content))


def announce(registry, *shards, num_ranks=1, next_problem=0, attempt="first"):
    for each in shards:
        ray.get(registry.announce.remote(each, num_ranks, next_problem, attempt))


def newest(registry, cursor=None, seconds=LONG):
    return ray.get(registry.newest.remote(cursor, seconds))


def test_a_version_counts_once_all_ranks_announced_it():
    registry = PolicyVersions.remote()
    announce(registry, shard(1, content=b"1"), num_ranks=2)
    assert newest(registry, seconds=SHORT) is None
    announce(registry, shard(0, content=b"0"), num_ranks=2, next_problem=17)
    published = newest(registry)
    (version,) = published.versions
    assert (version.version, version.num_ranks, published.next_problem) == (0, 2, 17)
    assert [bucket.rank for bucket in version.buckets] == [0, 1]
    contents = [ray.get(bucket.reference[0]).tobytes() for bucket in version.buckets]
    assert contents == [b"0", b"1"]
    ray.kill(registry)


def test_a_rank_that_announces_twice_counts_once():
    registry = PolicyVersions.remote()
    announce(registry, shard(0, content=b"old"), shard(0, content=b"new"), num_ranks=2)
    assert newest(registry, seconds=SHORT) is None
    announce(registry, shard(1), num_ranks=2)
    (version,) = newest(registry).versions
    assert ray.get(version.buckets[0].reference[0]).tobytes() == b"new"
    ray.kill(registry)


def versions_of(registry):
    return [version.version for version in newest(registry).versions]


def test_shards_of_different_versions_are_not_mixed():
    """A rank announced version 4 before the learners resumed from their checkpoint, step 3."""
    registry = PolicyVersions.remote()
    announce(registry, shard(0, 4), shard(1, 3), shard(0, 3), num_ranks=2)
    assert versions_of(registry) == [3]
    announce(registry, shard(1, 4), num_ranks=2)
    assert versions_of(registry) == [3]
    announce(registry, shard(0, 4), num_ranks=2)
    assert versions_of(registry) == [4]
    ray.kill(registry)


def test_shards_of_different_attempts_are_not_mixed():
    """Learners died after one had announced their first version, and restarted."""
    registry = PolicyVersions.remote()
    announce(registry, shard(0, 3, content=b"dead"), shard(2, 3), num_ranks=3)
    announce(registry, shard(1, 3), num_ranks=2, attempt="second")
    assert newest(registry, seconds=SHORT) is None
    announce(registry, shard(0, 3, content=b"alive"), num_ranks=2, attempt="second")
    (version,) = newest(registry).versions
    assert ray.get(version.buckets[0].reference[0]).tobytes() == b"alive"
    ray.kill(registry)


def test_a_delta_version_comes_with_its_base():
    registry = PolicyVersions.remote()
    announce(registry, shard(0, 5), shard(0, 6, base_version=5))
    assert versions_of(registry) == [5, 6]
    announce(registry, shard(0, 7, base_version=6))
    assert versions_of(registry) == [6, 7]
    # Learners that resumed from a checkpoint publish a full version, which replaces all.
    announce(registry, shard(0, 4))
    assert versions_of(registry) == [4]
    announce(registry, shard(0, 5, base_version=4))
    assert versions_of(registry) == [4, 5]
    ray.kill(registry)


def test_newest_waits_for_the_next_announcement():
    registry = PolicyVersions.remote()
    announce(registry, shard(0, 0))
    seen = newest(registry)
    waiting = registry.newest.remote(seen.cursor, LONG)
    assert ray.wait([waiting], timeout=SHORT)[0] == []
    announce(registry, shard(0, 1))
    assert [v.version for v in ray.get(waiting, timeout=LONG).versions] == [1]
    assert newest(registry, newest(registry).cursor, seconds=SHORT) is None
    # The same version again has a new cursor.
    cursor = newest(registry).cursor
    announce(registry, shard(0, 1))
    assert newest(registry, cursor).cursor != cursor
    ray.kill(registry)


def test_a_full_version_stays_requested_until_it_comes():
    registry = PolicyVersions.remote()
    assert ray.get(registry.requested_update.remote(0)) == "announce"
    announce(registry, shard(0, 0))
    assert ray.get(registry.requested_update.remote(0)) == "none"
    ray.get(registry.request_full.remote())
    assert ray.get(registry.requested_update.remote(0)) == "full"
    announce(registry, shard(0, 1, base_version=0))
    assert ray.get(registry.requested_update.remote(1)) == "full"
    announce(registry, shard(0, 2))
    assert ray.get(registry.requested_update.remote(2)) == "none"
    ray.kill(registry)


def test_learners_announce_again_after_a_restart():
    registry = PolicyVersions.options(max_restarts=-1, max_task_retries=-1).remote()
    announce(registry, shard(0, 3))
    cursor = newest(registry).cursor
    waiting = registry.newest.remote(cursor, LONG)
    ray.kill(registry, no_restart=False)
    assert becomes(lambda: ray.get(registry.requested_update.remote(3), timeout=LONG) == "announce")
    announce(registry, shard(0, 3))
    again = ray.get(waiting, timeout=LONG)
    assert [v.version for v in again.versions] == [3] and again.cursor != cursor
    ray.kill(registry)


def test_at_most_two_versions_are_alive_in_the_store():
    registry, size = PolicyVersions.remote(), 16 * MIB
    before = store_bytes()
    for version in range(5):
        for rank in range(2):
            reference = ray.put(np.full(size, version, np.uint8))
            announce(registry, RankShard(version, rank, (Bucket([reference], rank, 0, ()),), size), num_ranks=2)
            del reference
            assert store_bytes() > before + size - MIB
            assert settles_below(before + 2 * 2 * size + MIB)
        assert (ray.get(newest(registry).versions[-1].buckets[1].reference[0]) == version).all()
    ray.kill(registry)
    assert settles_below(before + MIB)


def store_bytes():
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return get_memory_info_reply(state).store_stats.object_store_bytes_used


def settles_below(limit):
    return becomes(lambda: store_bytes() <= limit)


def becomes(condition):
    end = time.monotonic() + 10
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_close_ends_all_waits():
    registry = PolicyVersions.remote()
    waiting = [registry.newest.remote(None, LONG) for _ in range(2)]
    assert ray.wait(waiting, timeout=SHORT)[0] == []
    ray.get(registry.close.remote("the learners have ended"))
    for wait in (*waiting, registry.newest.remote(None, LONG)):
        with pytest.raises(QueueClosed, match="the learners have ended"):
            ray.get(wait, timeout=LONG)
    ray.kill(registry)
