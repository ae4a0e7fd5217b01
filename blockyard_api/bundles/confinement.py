"""Keeps a process to one directory and to itself for the rest of its life: by Landlock, where it is there, and seccomp.

Landlock, landlock(7), decides what is opened and made. It knows no Unix socket that has a name in the file system, and
the process has the API's uid, whom the spawner obeys: so seccomp(2) takes the calls away by which others are reached.
"""

import ctypes
import errno
import os
import struct

from blockyard_api.hardening import bpf

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_VERSION, _PATH_BENEATH = 1, 1
_REFER_SINCE = 2  # before, a link from one directory to another could not be allowed at all
# LANDLOCK_ACCESS_FS_… by their bits, and since which version of its ABI the kernel knows how many.
_WRITE_FILE, _READ_FILE, _READ_DIR, _MAKE_DIR, _MAKE_REG, _MAKE_SYM, _REFER = (
    1 << bit for bit in (1, 2, 3, 7, 8, 12, 13)
)
_INSIDE = _WRITE_FILE | _READ_FILE | _READ_DIR | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER
_FILES = {2: 14, 3: 15, 4: 15, 5: 16}
_TCP_SINCE, _TCP = 4, 0b11  # bind and connect
_SCOPE_SINCE, _SCOPE = 6, 0b11  # abstract sockets and signals

_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # in struct seccomp_data
_FIRST_X32 = 1 << 30  # the same calls under other numbers, on x86-64 alone
# What reaches another process: sockets, signals, its memory and descriptors; io_uring can do all that itself.
# Architecture → the numbers of: socket, socketpair, connect, kill, tkill, tgkill, rt_sigqueueinfo,
# rt_tgsigqueueinfo, ptrace, process_vm_readv, process_vm_writev. The rest have the same everywhere.
_REACHING = {
    "x86_64": (41, 53, 42, 62, 200, 234, 129, 297, 101, 310, 311),
    "aarch64": (198, 199, 203, 129, 130, 131, 138, 240, 117, 270, 271),
}
_PIDFD_SEND_SIGNAL, _IO_URING_SETUP, _PIDFD_GETFD = 424, 425, 438


def reach_nobody() -> None:
    """Take away what connects this process to others, or signals them: EPERM. Needs no_new_privs. Raises OSError.

    Raises KeyError on an architecture that Blockyard does not know.
    """
    architecture = bpf.native()
    refused = (*_REACHING[architecture], _PIDFD_SEND_SIGNAL, _IO_URING_SETUP, _PIDFD_GETFD)
    program = [(bpf.LOAD, 0, 0, _ARCHITECTURE_AT), (bpf.JUMP_IF_EQUAL, 1, 0, bpf.ARCHITECTURES[architecture])]
    program += [(bpf.RETURN, 0, 0, bpf.KILL_PROCESS), (bpf.LOAD, 0, 0, _NUMBER_AT)]
    # A jump skips instructions: here to the last one, which refuses.
    program += [(bpf.JUMP_IF_AT_LEAST, len(refused) + 1, 0, _FIRST_X32)]
    program += [(bpf.JUMP_IF_EQUAL, len(refused) - at, 0, number) for at, number in enumerate(refused)]
    program += [(bpf.RETURN, 0, 0, bpf.ALLOW), (bpf.RETURN, 0, 0, bpf.ERRNO | errno.EPERM)]
    bpf.load(b"".join(bpf.INSTRUCTION.pack(*each) for each in program))


def stay_below(directory: int) -> bool:
    """Let this process open and make files below a directory alone; returns whether the kernel can.

    What is open stays open. Needs no_new_privs. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if (version := libc.syscall(_CREATE_RULESET, None, 0, _VERSION)) < _REFER_SINCE:
        return False

    def call(number: int, *arguments: object) -> int:
        if (result := int(libc.syscall(number, *arguments))) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    files = (1 << _FILES.get(version, max(_FILES.values()))) - 1
    tcp, scope = _TCP * (version >= _TCP_SINCE), _SCOPE * (version >= _SCOPE_SINCE)
    handled = struct.pack("QQQ", files, tcp, scope)[: 24 if scope else 16 if tcp else 8]
    ruleset = call(_CREATE_RULESET, handled, len(handled), 0)
    try:
        call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", _INSIDE, directory), 0)
        call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return True
