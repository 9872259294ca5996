"""The two actors between learners and generators: what they hand over, and when they give up."""

from __future__ import annotations

import time

import numpy as np
import pytest
import ray

from pear_ray.data.batch_queue import BatchQueue, QueueClosed
from pear_ray.weights.registry import PolicyVersions
from pear_ray.weights.types import Bucket, RankShard

pytestmark = pytest.mark.usefixtures("ray_session")

SHORT, LONG = 0.3, 60.0
MIB = 2**20


def share(rank, version=0, label=b"", base_version=None):
    """One rank's part of a version, told apart by its content."""
    reference = [ray.put(np.frombuffer(label, np.uint8))]
    return RankShard(version, rank, (Bucket(reference, rank, 0, (), base_version),), len(label))


def announce(versions_actor, *shares, num_ranks=1, next_problem=0, attempt="first"):
    for each in shares:
        ray.get(versions_actor.announce.remote(each, num_ranks, next_problem, attempt))


def newest(versions_actor, cursor=None, seconds=LONG):
    return ray.get(versions_actor.newest.remote(cursor, seconds))


def test_a_version_counts_once_every_rank_has_announced_it():
    versions_actor = PolicyVersions.remote()
    announce(versions_actor, share(1, label=b"1"), num_ranks=2)
    assert newest(versions_actor, seconds=SHORT) is None
    announce(versions_actor, share(0, label=b"0"), num_ranks=2, next_problem=17)
    announced = newest(versions_actor)
    (version,) = announced.versions
    assert (version.version, version.num_ranks, announced.next_problem) == (0, 2, 17)
    assert [bucket.rank for bucket in version.buckets] == [0, 1]
    contents = [ray.get(bucket.reference[0]).tobytes() for bucket in version.buckets]
    assert contents == [b"0", b"1"]
    ray.kill(versions_actor)


def test_a_rank_that_announces_twice_counts_once():
    versions_actor = PolicyVersions.remote()
    announce(versions_actor, share(0, label=b"old"), share(0, label=b"new"), num_ranks=2)
    assert newest(versions_actor, seconds=SHORT) is None
    announce(versions_actor, share(1), num_ranks=2)
    (version,) = newest(versions_actor).versions
    assert ray.get(version.buckets[0].reference[0]).tobytes() == b"new"
    ray.kill(versions_actor)


def versions_of(versions_actor):
    return [version.version for version in newest(versions_actor).versions]


def test_shares_of_different_versions_are_not_mixed():
    """A rank had announced version 4 when the learners went back to their checkpoint, step 3."""
    versions_actor = PolicyVersions.remote()
    announce(versions_actor, share(0, 4), share(1, 3), share(0, 3), num_ranks=2)
    assert versions_of(versions_actor) == [3]
    announce(versions_actor, share(1, 4), num_ranks=2)
    assert versions_of(versions_actor) == [3]
    announce(versions_actor, share(0, 4), num_ranks=2)
    assert versions_of(versions_actor) == [4]
    ray.kill(versions_actor)


def test_shares_of_different_attempts_are_not_mixed():
    """Learners died after one of them had announced their first version, and began again."""
    versions_actor = PolicyVersions.remote()
    announce(versions_actor, share(0, 3, label=b"dead"), share(2, 3), num_ranks=3)
    announce(versions_actor, share(1, 3), num_ranks=2, attempt="second")
    assert newest(versions_actor, seconds=SHORT) is None
    announce(versions_actor, share(0, 3, label=b"alive"), num_ranks=2, attempt="second")
    (version,) = newest(versions_actor).versions
    assert ray.get(version.buckets[0].reference[0]).tobytes() == b"alive"
    ray.kill(versions_actor)


def test_a_change_comes_with_what_it_changes():
    versions_actor = PolicyVersions.remote()
    announce(versions_actor, share(0, 5), share(0, 6, base_version=5))
    assert versions_of(versions_actor) == [5, 6]
    announce(versions_actor, share(0, 7, base_version=6))
    assert versions_of(versions_actor) == [6, 7]
    # Learners that fell back to a checkpoint: what they say is whole, and all else is void.
    announce(versions_actor, share(0, 4))
    assert versions_of(versions_actor) == [4]
    announce(versions_actor, share(0, 5, base_version=4))
    assert versions_of(versions_actor) == [4, 5]
    ray.kill(versions_actor)


def test_a_wait_ends_with_the_next_announcement():
    versions_actor = PolicyVersions.remote()
    announce(versions_actor, share(0, 0))
    seen = newest(versions_actor)
    waiting = versions_actor.newest.remote(seen.cursor, LONG)
    assert ray.wait([waiting], timeout=SHORT)[0] == []
    announce(versions_actor, share(0, 1))
    assert [v.version for v in ray.get(waiting, timeout=LONG).versions] == [1]
    assert newest(versions_actor, newest(versions_actor).cursor, seconds=SHORT) is None
    # The same version again, whole this time, is news too.
    cursor = newest(versions_actor).cursor
    announce(versions_actor, share(0, 1))
    assert newest(versions_actor, cursor).cursor != cursor
    ray.kill(versions_actor)


def test_whole_weights_are_wished_for_until_they_come():
    versions_actor = PolicyVersions.remote()
    assert ray.get(versions_actor.requested_update.remote(0)) == "again"
    announce(versions_actor, share(0, 0))
    assert ray.get(versions_actor.requested_update.remote(0)) == "nothing"
    ray.get(versions_actor.request_full.remote())
    assert ray.get(versions_actor.requested_update.remote(0)) == "full"
    announce(versions_actor, share(0, 1, base_version=0))
    assert ray.get(versions_actor.requested_update.remote(1)) == "full"
    announce(versions_actor, share(0, 2))
    assert ray.get(versions_actor.requested_update.remote(2)) == "nothing"
    ray.kill(versions_actor)


RESTARTABLE = {"max_restarts": -1, "max_task_retries": -1}


def test_a_board_that_died_is_told_again():
    versions_actor = PolicyVersions.options(**RESTARTABLE).remote()
    announce(versions_actor, share(0, 3))
    cursor = newest(versions_actor).cursor
    waiting = versions_actor.newest.remote(cursor, LONG)
    ray.kill(versions_actor, no_restart=False)
    assert becomes(
        lambda: ray.get(versions_actor.requested_update.remote(3), timeout=LONG) == "again"
    )
    announce(versions_actor, share(0, 3))
    again = ray.get(waiting, timeout=LONG)
    assert [v.version for v in again.versions] == [3] and again.cursor != cursor
    ray.kill(versions_actor)


def test_at_most_two_versions_are_alive_in_the_store():
    versions_actor, size = PolicyVersions.remote(), 16 * MIB
    before = store_bytes()
    for version in range(5):
        for rank in range(2):
            reference = ray.put(np.full(size, version, np.uint8))
            announce(
                versions_actor,
                RankShard(version, rank, (Bucket([reference], rank, 0, ()),), size),
                num_ranks=2,
            )
            del reference
            assert store_bytes() > before + size - MIB
            assert settles_below(before + 2 * 2 * size + MIB)
        assert (
            ray.get(newest(versions_actor).versions[-1].buckets[1].reference[0]) == version
        ).all()
    ray.kill(versions_actor)
    assert settles_below(before + MIB)


def store_bytes():
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return get_memory_info_reply(state).store_stats.object_store_bytes_used


def settles_below(limit):
    return becomes(lambda: store_bytes() <= limit)


def becomes(condition):
    end = time.monotonic() + 10
    while not (is_so := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return is_so


def test_closing_the_board_wakes_those_who_wait():
    versions_actor = PolicyVersions.remote()
    waiting = [versions_actor.newest.remote(None, LONG) for _ in range(2)]
    assert ray.wait(waiting, timeout=SHORT)[0] == []
    ray.get(versions_actor.close.remote("the learners have ended"))
    for wait in (*waiting, versions_actor.newest.remote(None, LONG)):
        with pytest.raises(QueueClosed, match="the learners have ended"):
            ray.get(wait, timeout=LONG)
    ray.kill(versions_actor)


def take(queue, step, deadline=LONG):
    return ray.get(ray.get(queue.take.remote(step, deadline))[0])


def put(queue, step):
    ray.get(queue.put.remote(step, [ray.put(f"rollouts of {step}")]))


def test_rollouts_come_by_step_and_again_when_asked_again():
    queue = BatchQueue.remote()
    waiting = queue.take.remote(0, LONG)
    for step in (2, 0, 1):
        put(queue, step)
    assert ray.get(ray.get(waiting, timeout=LONG)[0]) == "rollouts of 0"
    # A learner that went back to a checkpoint asks for the same steps again.
    for step in (0, 1, 2, 1, 2):
        assert take(queue, step) == f"rollouts of {step}"
    with pytest.raises(TimeoutError, match="data of step 3: not ready within 0 s"):
        take(queue, 3, SHORT)
    ray.kill(queue)


def test_forgotten_rollouts_are_gone_and_later_ones_stay():
    queue = BatchQueue.remote()
    for step in range(4):
        put(queue, step)
    ray.get(queue.forget_before.remote(2))
    for step in (0, 1):
        with pytest.raises(TimeoutError, match=f"step {step}"):
            take(queue, step, SHORT)
    assert [take(queue, step) for step in (2, 3)] == ["rollouts of 2", "rollouts of 3"]
    ray.kill(queue)


def test_a_closed_queue_still_gives_what_is_ready():
    queue = BatchQueue.remote()
    put(queue, 0)
    waiting = queue.take.remote(1, LONG)
    assert ray.wait([waiting], timeout=SHORT)[0] == []
    ray.get(queue.close.remote("the rollouts failed: no problems"))
    with pytest.raises(QueueClosed, match="the rollouts failed: no problems"):
        ray.get(waiting, timeout=LONG)
    assert take(queue, 0) == "rollouts of 0"
    with pytest.raises(QueueClosed):
        take(queue, 2)
    ray.kill(queue)


def test_whoever_fills_the_queue_learns_where_to_begin_and_waits_for_learners():
    queue = BatchQueue.remote(2)
    with pytest.raises(TimeoutError, match="no learner asked within 0 s"):
        ray.get(queue.first_wanted.remote(SHORT))
    waiting = queue.take.remote(5, LONG)
    assert ray.get(queue.first_wanted.remote(LONG)) == 5
    for step in (5, 6, 7):
        put(queue, step)
    assert ray.get(ray.get(waiting, timeout=LONG)[0]) == "rollouts of 5"
    with pytest.raises(TimeoutError, match="step 8: learners did not come near within 0 s"):
        ray.get(queue.put.remote(8, [None], SHORT))
    coming = queue.put.remote(8, [ray.put("rollouts of 8")], LONG)
    assert take(queue, 6) == "rollouts of 6"
    ray.get(coming, timeout=LONG)
    # A learner that restarts takes old steps again, which makes no more room.
    assert take(queue, 5) == "rollouts of 5"
    late = queue.put.remote(9, [None], LONG)
    assert ray.wait([late], timeout=SHORT)[0] == []
    ray.get(queue.close.remote("the learners have ended"))
    with pytest.raises(QueueClosed, match="the learners have ended"):
        ray.get(late, timeout=LONG)
    ray.kill(queue)


def test_a_queue_that_died_is_empty_and_has_another_name():
    queue = BatchQueue.options(**RESTARTABLE).remote()
    put(queue, 0)
    ray.get(queue.forget_before.remote(0))
    before = ray.get(queue.state.remote())
    waiting = queue.take.remote(1, LONG)
    assert ray.wait([waiting], timeout=SHORT)[0] == []
    assert ray.get(queue.state.remote()).is_awaited and not before.is_awaited
    ray.kill(queue, no_restart=False)
    assert becomes(lambda: ray.get(queue.state.remote(), timeout=LONG).name != before.name)
    put(queue, 1)
    assert ray.get(ray.get(waiting, timeout=LONG)[0]) == "rollouts of 1"
    with pytest.raises(TimeoutError):
        take(queue, 0, SHORT)
    ray.kill(queue)
