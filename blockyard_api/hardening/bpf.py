"""The kernel's own instructions for a system call filter, seccomp(2), and their way into the process that calls."""

import ctypes
import os
import platform
import struct
from collections.abc import Iterable

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_…, by which kernel and libseccomp call one
INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter
LOAD, AND, RETURN = 0x20, 0x54, 0x06  # BPF_…
JUMP, JUMP_IF_EQUAL, JUMP_IF_GREATER, JUMP_IF_AT_LEAST = 0x05, 0x15, 0x25, 0x35
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000  # SECCOMP_RET_…, and libseccomp's SCMP_ACT_…
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2


def native() -> str:
    """Name this machine's architecture, as the kernel does."""
    return platform.machine()


def packed(instructions: Iterable[tuple[int, int, int, int]]) -> bytes:
    """Return instructions as the kernel takes them."""
    return b"".join(INSTRUCTION.pack(*instruction) for instruction in instructions)


def load(program: bytes) -> None:
    """Filter this process's system calls for the rest of its life. Needs no_new_privs. Raises OSError."""
    instructions = ctypes.create_string_buffer(program, len(program))
    count = len(program) // INSTRUCTION.size
    header = ctypes.create_string_buffer(struct.pack("@HP", count, ctypes.addressof(instructions)))
    arguments = (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0)
    if ctypes.CDLL(None, use_errno=True).prctl(*map(ctypes.c_ulong, arguments)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
