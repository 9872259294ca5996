"""The queue of training batches: order, waits, closing and restarts."""

from __future__ import annotations

import time

import pytest
import ray

from pear_ray.data.batch_queue import BatchQueue, QueueClosed

pytestmark = pytest.mark.usefixtures("ray_session")

SHORT, LONG = 0.3, 60.0


def take(queue, step, deadline=LONG):
    return ray.get(ray.get(queue.take.remote(step, deadline))[0])


def put(queue, step):
    ray.get(queue.put.remote(step, [ray.put(f"rollouts of {step}")]))


def test_batches_come_by_step_and_again_on_request():
    queue = BatchQueue.remote()
    waiting = queue.take.remote(0, LONG)
    for step in (2, 0, 1):
        put(queue, step)
    assert ray.get(ray.get(waiting, timeout=LONG)[0]) == "rollouts of 0"
    # A learner that resumed from a checkpoint requests the same steps again.
    for step in (0, 1, 2, 1, 2):
        assert take(queue, step) == f"rollouts of {step}"
    with pytest.raises(TimeoutError, match="waited 0 s for the batch of step 3"):
        take(queue, 3, SHORT)
    ray.kill(queue)


def test_dropped_batches_are_gone_and_later_ones_stay():
    queue = BatchQueue.remote()
    for step in range(4):
        put(queue, step)
    ray.get(queue.drop_before.remote(2))
    for step in (0, 1):
        with pytest.raises(TimeoutError, match=f"step {step}"):
            take(queue, step, SHORT)
    assert [take(queue, step) for step in (2, 3)] == ["rollouts of 2", "rollouts of 3"]
    ray.kill(queue)


def test_a_closed_queue_still_returns_ready_batches():
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


def test_the_producer_waits_for_the_first_request_and_stays_near_the_learners():
    queue = BatchQueue.remote(2)
    with pytest.raises(TimeoutError, match="waited 0 s for a learner's first request"):
        ray.get(queue.first_requested.remote(SHORT))
    waiting = queue.take.remote(5, LONG)
    assert ray.get(queue.first_requested.remote(LONG)) == 5
    for step in (5, 6, 7):
        put(queue, step)
    assert ray.get(ray.get(waiting, timeout=LONG)[0]) == "rollouts of 5"
    with pytest.raises(TimeoutError, match="waited 0 s for learners near step 8"):
        ray.get(queue.put.remote(8, [None], SHORT))
    coming = queue.put.remote(8, [ray.put("rollouts of 8")], LONG)
    assert take(queue, 6) == "rollouts of 6"
    ray.get(coming, timeout=LONG)
    # A restarted learner takes old steps again, which makes no room.
    assert take(queue, 5) == "rollouts of 5"
    delayed = queue.put.remote(9, [None], LONG)
    assert ray.wait([delayed], timeout=SHORT)[0] == []
    ray.get(queue.close.remote("the learners have ended"))
    with pytest.raises(QueueClosed, match="the learners have ended"):
        ray.get(delayed, timeout=LONG)
    ray.kill(queue)


def test_a_restarted_queue_is_empty_and_has_another_name():
    queue = BatchQueue.options(max_restarts=-1, max_task_retries=-1).remote()
    put(queue, 0)
    ray.get(queue.drop_before.remote(0))
    before = ray.get(queue.state.remote())
    waiting = queue.take.remote(1, LONG)
    assert ray.wait([waiting], timeout=SHORT)[0] == []
    assert ray.get(queue.state.remote()).is_awaited and not before.is_awaited
    ray.kill(queue, no_restart=False)
    deadline = time.monotonic() + 10
    while ray.get(queue.state.remote(), timeout=LONG).name == before.name:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    put(queue, 1)
    assert ray.get(ray.get(waiting, timeout=LONG)[0]) == "rollouts of 1"
    with pytest.raises(TimeoutError):
        take(queue, 0, SHORT)
    ray.kill(queue)
