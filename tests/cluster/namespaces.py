"""Machines within this machine: each has a network with an address of its own, its own shared memory, and no way out
but to the others. They share files and processors."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ip", "mount", "nsenter", "unshare")
INTERFACE = "lan"
NET = "10.77.0"
# As the mask of NET wants it; the first machine's address ends with 1.
MOST = 254
# Machines whose test was killed end by themselves.
SECONDS_TO_LIVE = 3600
SECONDS = 30.0
BEGIN = f"mount -t tmpfs -o mode=1777 tmpfs /dev/shm && ip link set lo up && echo ready && exec sleep {SECONDS_TO_LIVE}"
TRIAL = "mount -t tmpfs tmpfs /dev/shm && ip link add lan type bridge && ip link add cable type veth"
CLONE_NEWNET = 0x40000000


def why_not() -> str | None:
    """What keeps this process from making such machines."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)} (Debian: iproute2, mount, util-linux)"
    command = ["unshare", "--net", "--mount", "sh", "-c", TRIAL]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Machine:
    address: str
    holder: int
    """Id of the process that keeps its namespaces while nothing else runs there."""
    namespace: str
    """Of its network, as `/proc/ID/ns/net` of its processes names it."""

    def command(self, *words: str) -> list[str]:
        """The command that does this on the machine."""
        return ["nsenter", "--target", str(self.holder), "--net", "--mount", "--", *words]

    def do(self, words: str) -> None:
        subprocess.run(self.command(*words.split()), check=True, timeout=SECONDS)

    @contextmanager
    def network(self) -> Iterator[None]:
        """In this block sockets of this thread, and processes that it starts, are in the machine's network.

        Raises:
            OSError: the machine is gone.
        """
        with open("/proc/thread-self/ns/net") as own, open(f"/proc/{self.holder}/ns/net") as there:
            enter(there.fileno())
            try:
                yield
            finally:
                enter(own.fileno())

    def processes(self) -> set[int]:
        """Ids of all processes in its network, but for the calling one."""
        found = set()
        for link in Path("/proc").glob("[0-9]*/ns/net"):
            with suppress(OSError):
                if os.readlink(link) == self.namespace:
                    found.add(int(link.parts[2]))
        return found - {os.getpid()}

    def end(self) -> None:
        """End all that runs there; with the last process the namespaces go."""
        for process in self.processes() - {self.holder}:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def held(address: str) -> Iterator[Machine]:
    """A machine without a cable, until the block ends."""
    command = ["unshare", "--net", "--mount", "sh", "-c", BEGIN]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            is_told, _, _ = select.select([holder.stdout], [], [], SECONDS)
            assert is_told and holder.stdout.readline() == b"ready\n", "no namespace was made"
            namespace = os.readlink(f"/proc/{holder.pid}/ns/net")
            machine = Machine(address, holder.pid, namespace)
            try:
                yield machine
            finally:
                machine.end()
        finally:
            holder.kill()


@contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """So many machines that reach each other and nothing else; all is gone when the block ends.

    Raises:
        subprocess.CalledProcessError: `ip` refused something; see `why_not`.
    """
    assert 0 < count <= MOST
    with ExitStack() as stack:
        found = [stack.enter_context(held(f"{NET}.{number + 1}")) for number in range(count)]
        first, *others = found
        first.do(f"ip link add {INTERFACE} type bridge")
        for number, other in enumerate(others):
            end = f"cable{number} type veth peer name {INTERFACE} netns {other.holder}"
            first.do(f"ip link add {end}")
            first.do(f"ip link set cable{number} master {INTERFACE} up")
        for one in found:
            one.do(f"ip address add {one.address}/24 dev {INTERFACE}")
            one.do(f"ip link set {INTERFACE} up")
        yield found
