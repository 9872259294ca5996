"""The network denied to one thread, while others keep it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from pear_ray.rewards.pool import deny_network


def open_socket(family: int) -> str:
    try:
        socket.socket(family, socket.SOCK_STREAM).close()
    except PermissionError:
        return "denied"
    return "opened"


def in_a_thread(function: Callable[[], object]) -> object:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(10)
    (result,) = results
    return result


@pytest.mark.parametrize(
    ("family", "expected"), [(socket.AF_INET, "denied"), (socket.AF_INET6, "denied"), (socket.AF_UNIX, "opened")]
)
def test_the_thread_and_those_it_starts_open_unix_sockets_only(family: int, expected: str) -> None:
    def confined() -> tuple[str, object]:
        assert deny_network()
        return open_socket(family), in_a_thread(lambda: open_socket(family))

    assert in_a_thread(confined) == (expected, expected)
    assert open_socket(family) == "opened"
