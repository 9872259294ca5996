"""Takes the network from a thread and from whatever it starts, through seccomp (Linux).

Only the calling thread: the others of a Ray process go on talking to Ray. Sockets that it has
already, and Unix sockets, stay usable. There is no way back, which is what it is for.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import platform
import socket
import struct

log = logging.getLogger(__name__)

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
# AUDIT_ARCH_*, and the numbers of the system calls socket and io_uring_setup (makes sockets too).
MACHINES = {"x86_64": (0xC000003E, 41, 425), "aarch64": (0xC00000B7, 198, 425)}
# Calls of the 32-bit numbering of x86_64.
X32 = 0x40000000
# Where a filter finds them: struct seccomp_data.
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def deny_network() -> bool:
    """From now on this thread cannot make a socket but a Unix one: PermissionError. Returns whether
    that is so; where the system cannot do it, a warning says why."""
    try:
        machine, number_of_socket, number_of_uring = MACHINES[platform.machine()]
    except KeyError:
        log.warning("verdicts keep the network: no filter for %s", platform.machine())
        return False
    # Jumps count instructions from the next one on: if true, if false.
    instructions = [
        (LOAD, 0, 0, MACHINE),
        (IF_EQUAL, 0, 6, machine),
        (LOAD, 0, 0, NUMBER),
        (IF_AT_LEAST, 4, 0, X32),
        (IF_EQUAL, 3, 0, number_of_uring),
        (IF_EQUAL, 0, 3, number_of_socket),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (IF_EQUAL, 1, 0, socket.AF_UNIX),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    program = _Program(len(instructions), code)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        reason = errno.errorcode.get(ctypes.get_errno(), "unknown")
        log.warning("verdicts keep the network: the kernel refuses a filter (%s)", reason)
        return False
    return True
