"""Deny the network to a thread and to the processes and threads it starts (Linux seccomp).

Other threads of the process, Ray's among them, keep the network. Open sockets and Unix sockets stay usable. A filter
cannot be removed.
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
# AUDIT_ARCH_*, and the system calls socket and io_uring_setup, which opens sockets too.
MACHINES = {"x86_64": (0xC000003E, 41, 425), "aarch64": (0xC00000B7, 198, 425)}
# System calls of the x32 ABI start here.
X32 = 0x40000000
# Offsets in struct seccomp_data.
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, DENY = 0x7FFF0000, 0x00050000 | errno.EACCES


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def deny_network() -> bool:
    """Let `socket` raise PermissionError in this thread, except for Unix sockets.

    Returns:
        False if the system does not support it; logs a warning then.
    """
    if platform.machine() not in MACHINES:
        log.warning("graders keep the network: no filter for %s", platform.machine())
        return False
    machine, socket_number, uring_number = MACHINES[platform.machine()]
    # (operation, jump if true, jump if false, operand); jumps skip that number of instructions.
    instructions = [
        (LOAD, 0, 0, MACHINE),
        (IF_EQUAL, 0, 6, machine),
        (LOAD, 0, 0, NUMBER),
        (IF_AT_LEAST, 4, 0, X32),
        (IF_EQUAL, 3, 0, uring_number),
        (IF_EQUAL, 0, 3, socket_number),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (IF_EQUAL, 1, 0, socket.AF_UNIX),
        (RETURN, 0, 0, DENY),
        (RETURN, 0, 0, ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    program = _Program(len(instructions), code)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        reason = errno.errorcode.get(ctypes.get_errno(), "unknown")
        log.warning("graders keep the network: the kernel refused the filter (%s)", reason)
        return False
    return True
