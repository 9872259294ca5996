"""The two actors between learners and generators: what they hand over, and when they give up."""

from __future__ import annotations

import time

import numpy as np
import pytest
import ray

from pear_ray.actors.board import Board, Closed, StepQueue
from pear_ray.weights.manifest import Bucket

pytestmark = pytest.mark.usefixtures("ray_session")

SHORT, LONG = 0.3, 60.0
MIB = 2**20


def share(rank, label=b""):
    """One rank's buckets, told apart by their content."""
    return [Bucket([ray.put(np.frombuffer(label, np.uint8))], rank, 0, ())]


def newest(board, minimum=0, deadline=LONG):
    return ray.get(board.newest.remote(minimum, deadline))


def test_a_version_counts_once_every_rank_has_announced_it():
    board = Board.remote()
    ray.get(board.announce.remote(0, 1, 2, share(1, b"1")))
    with pytest.raises(TimeoutError, match=r"weights version 0: .* \(newest: none\)"):
        newest(board, deadline=SHORT)
    ray.get(board.announce.remote(0, 0, 2, share(0, b"0")))
    version = newest(board)
    assert (version.version, version.num_ranks) == (0, 2)
    assert [bucket.rank for bucket in version.buckets] == [0, 1]
    contents = [ray.get(bucket.reference[0]).tobytes() for bucket in version.buckets]
    assert contents == [b"0", b"1"]
    ray.kill(board)


def test_a_rank_that_announces_twice_counts_once():
    board = Board.remote()
    for label in (b"old", b"new"):
        ray.get(board.announce.remote(0, 0, 2, share(0, label)))
    with pytest.raises(TimeoutError):
        newest(board, deadline=SHORT)
    ray.get(board.announce.remote(0, 1, 2, share(1)))
    assert ray.get(newest(board).buckets[0].reference[0]).tobytes() == b"new"
    ray.kill(board)


def test_shares_of_different_versions_are_not_mixed():
    """A rank had announced version 4 when the learners went back to their checkpoint, step 3."""
    board = Board.remote()
    ray.get(board.announce.remote(4, 0, 2, share(0)))
    for rank in (1, 0):
        ray.get(board.announce.remote(3, rank, 2, share(rank)))
    assert newest(board).version == 3
    ray.get(board.announce.remote(4, 1, 2, share(1)))
    assert newest(board).version == 3
    ray.get(board.announce.remote(4, 0, 2, share(0)))
    assert newest(board).version == 4
    ray.kill(board)


def test_a_wait_ends_with_the_version_that_satisfies_it():
    board = Board.remote()
    ray.get(board.announce.remote(0, 0, 1, share(0)))
    waiting = board.newest.remote(2, LONG)
    ray.get(board.announce.remote(1, 0, 1, share(0)))
    assert ray.wait([waiting], timeout=SHORT)[0] == []
    ray.get(board.announce.remote(2, 0, 1, share(0)))
    assert ray.get(waiting, timeout=LONG).version == 2
    with pytest.raises(TimeoutError, match=r"weights version 3: .* 0 s \(newest: 2\)"):
        newest(board, 3, deadline=SHORT)
    ray.kill(board)


def test_at_most_two_versions_are_alive_in_the_store():
    board, size = Board.remote(), 16 * MIB
    before = store_bytes()
    for version in range(5):
        for rank in range(2):
            reference = ray.put(np.full(size, version, np.uint8))
            ray.get(board.announce.remote(version, rank, 2, [Bucket([reference], rank, 0, ())]))
            del reference
            assert store_bytes() > before + size - MIB
            assert settles_below(before + 2 * 2 * size + MIB)
        assert (ray.get(newest(board).buckets[1].reference[0]) == version).all()
    assert settles_below(before + 2 * size + MIB)
    ray.kill(board)
    assert settles_below(before + MIB)


def store_bytes():
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return get_memory_info_reply(state).store_stats.object_store_bytes_used


def settles_below(limit):
    end = time.monotonic() + 10
    while (used := store_bytes()) > limit and time.monotonic() < end:
        time.sleep(0.05)
    return used <= limit


def test_closing_the_board_wakes_those_who_wait():
    board = Board.remote()
    waiting = [board.newest.remote(minimum, LONG) for minimum in (0, 7)]
    assert ray.wait(waiting, timeout=SHORT)[0] == []
    ray.get(board.close.remote("the learners have ended"))
    for wait in (*waiting, board.newest.remote(0, LONG)):
        with pytest.raises(Closed, match="the learners have ended"):
            ray.get(wait, timeout=LONG)
    ray.kill(board)


def take(queue, step, deadline=LONG):
    return ray.get(ray.get(queue.take.remote(step, deadline))[0])


def put(queue, step):
    ray.get(queue.put.remote(step, [ray.put(f"rollouts of {step}")]))


def test_rollouts_come_by_step_and_again_when_asked_again():
    queue = StepQueue.remote()
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
    queue = StepQueue.remote()
    for step in range(4):
        put(queue, step)
    ray.get(queue.forget_before.remote(2))
    for step in (0, 1):
        with pytest.raises(TimeoutError, match=f"step {step}"):
            take(queue, step, SHORT)
    assert [take(queue, step) for step in (2, 3)] == ["rollouts of 2", "rollouts of 3"]
    ray.kill(queue)


def test_a_closed_queue_still_gives_what_is_ready():
    queue = StepQueue.remote()
    put(queue, 0)
    waiting = queue.take.remote(1, LONG)
    assert ray.wait([waiting], timeout=SHORT)[0] == []
    ray.get(queue.close.remote("the rollouts failed: no problems"))
    with pytest.raises(Closed, match="the rollouts failed: no problems"):
        ray.get(waiting, timeout=LONG)
    assert take(queue, 0) == "rollouts of 0"
    with pytest.raises(Closed):
        take(queue, 2)
    ray.kill(queue)


def test_whoever_fills_the_queue_learns_where_to_begin_and_waits_for_learners():
    queue = StepQueue.remote(2)
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
    with pytest.raises(Closed, match="the learners have ended"):
        ray.get(late, timeout=LONG)
    ray.kill(queue)
