"""A thread without network, beside others that keep theirs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from pear_ray.rewards.sandbox import deny_network


def make(family: int) -> str:
    try:
        socket.socket(family, socket.SOCK_STREAM).close()
    except PermissionError:
        return "refused"
    return "made"


def in_a_thread(function: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(10)
    (result,) = found
    return result


@pytest.mark.parametrize(
    ("family", "expected"),
    [(socket.AF_INET, "refused"), (socket.AF_INET6, "refused"), (socket.AF_UNIX, "made")],
)
def test_the_thread_and_those_it_starts_make_unix_sockets_only(family: int, expected: str) -> None:
    def confined() -> tuple[str, object]:
        assert deny_network()
        return make(family), in_a_thread(lambda: make(family))

    assert in_a_thread(confined) == (expected, expected)
    assert make(family) == "made"
