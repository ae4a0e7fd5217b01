"""Keeps a process to one directory for the rest of its life, where the kernel can: Landlock, landlock(7)."""

import ctypes
import os
import struct

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


def confine(directory: int) -> bool:
    """Let this process open and make files below a directory alone, and reach nobody; returns whether the kernel can.

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
