"""Keeps a process to one directory and to itself for the rest of its life: by Landlock, where it is there, and seccomp.

Landlock, landlock(7), decides what is opened and made. It knows no Unix socket that has a name in the file system, no
change of a file's mode, owner, times or attributes, and before Linux 6.12 no signal; and the process has the API's uid,
whom the spawner obeys. So seccomp(2) takes away the calls by which others, and files elsewhere, are reached.
"""

import ctypes
import errno
import fcntl
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

_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data
_ARGUMENT = 8  # bytes, of which the kernel takes the lower half for what stands in _REFUSED_BY_ARGUMENT
_FIRST_X32 = 1 << 30  # the same calls under other numbers, on x86-64 alone
_ARCHITECTURES = ("x86_64", "aarch64")  # whose numbers stand below, in this order
REFUSED = {
    # Sockets, and what else is shared by a name or a uid, some of which would stay behind.
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Signals.
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    # Another's memory and descriptors; io_uring can do all of this itself.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "perf_event_open": (298, 241),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "io_uring_setup": (425, 425),
    # Another's limits and processor time.
    "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    # Files changed by their path, which Landlock lets pass, truncate before Linux 6.2 alone: a descriptor is enough.
    "chmod": (90, None),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "truncate": (76, 45),
    # Their flags, which matter below, are in memory where no filter reads them; the latter goes by no path.
    "openat2": (437, 437),
    "open_by_handle_at": (304, 265),
}
_ALL = 0xFFFFFFFF
_F_SETOWN_EX, _FIOSETOWN, _SIOCSPGRP, _PR_SCHED_CORE = 15, 0x8901, 0x8902, 62
# Name → numbers, which argument, its bits that count, and their values that are refused.
_REFUSED_BY_ARGUMENT = {
    # Whom a descriptor signals, and by what: a pipe that has something to read would send SIGKILL.
    "fcntl": ((72, 25), 1, _ALL, (fcntl.F_SETOWN, fcntl.F_SETSIG, _F_SETOWN_EX)),
    "ioctl": ((16, 29), 1, _ALL, (_FIOSETOWN, _SIOCSPGRP)),  # the same for sockets: the log is one
    "prctl": ((157, 167), 0, _ALL, (_PR_SCHED_CORE,)),  # with whom another shares its core
    # Neither for reading nor for writing: Landlock lets it open whatever it is, to change its mode or to truncate it.
    "open": ((2, None), 1, os.O_ACCMODE, (os.O_ACCMODE,)),
    "openat": ((257, 56), 2, os.O_ACCMODE, (os.O_ACCMODE,)),
}


def reach_nobody() -> None:
    """Take away what reaches other processes, or files by their path alone: EPERM. Needs no_new_privs. Raises OSError.

    Raises KeyError on an architecture that Blockyard does not know.
    """
    bpf.load(bpf.packed(instructions(bpf.native())))


def instructions(architecture: str) -> list[tuple[int, int, int, int]]:
    """Return the filter for one architecture. Raises KeyError."""
    token = bpf.ARCHITECTURES[architecture]
    column = _ARCHITECTURES.index(architecture)
    refused = [number for each in REFUSED.values() if (number := each[column]) is not None]
    refuse = (bpf.RETURN, 0, 0, bpf.ERRNO | errno.EPERM)
    program = [(bpf.LOAD, 0, 0, _ARCHITECTURE_AT), (bpf.JUMP_IF_EQUAL, 1, 0, token)]
    program += [(bpf.RETURN, 0, 0, bpf.KILL_PROCESS), (bpf.LOAD, 0, 0, _NUMBER_AT)]
    # A jump skips instructions: here to the one that refuses, or over it.
    program += [(bpf.JUMP_IF_AT_LEAST, len(refused) + 1, 0, _FIRST_X32)]
    program += [(bpf.JUMP_IF_EQUAL, len(refused) - at + 1, 0, number) for at, number in enumerate(refused, 1)]
    program += [(bpf.JUMP, 0, 0, 1), refuse]
    for numbers, argument, bits, values in _REFUSED_BY_ARGUMENT.values():
        if (number := numbers[column]) is None:
            continue
        tried = [(bpf.LOAD, 0, 0, _ARGUMENTS_AT + argument * _ARGUMENT), (bpf.AND, 0, 0, bits)]
        tried += [(bpf.JUMP_IF_EQUAL, len(values) - at + 1, 0, value) for at, value in enumerate(values, 1)]
        tried += [(bpf.RETURN, 0, 0, bpf.ALLOW), refuse]
        program += [(bpf.JUMP_IF_EQUAL, 0, len(tried), number), *tried]
    return [*program, (bpf.RETURN, 0, 0, bpf.ALLOW)]


def stay_below(directory: int) -> bool:
    """Let this process open and make files below a directory alone; returns whether the kernel can.

    What is open stays open. Needs no_new_privs. Raises OSError, also where a filter keeps it from what the kernel can.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: object) -> int:
        if (result := int(libc.syscall(number, *arguments))) < 0:
            raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
        return result

    try:
        version = call(_CREATE_RULESET, None, 0, _VERSION)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):  # not built in, or switched off at boot
            raise
        return False
    if version < _REFER_SINCE:
        return False
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
