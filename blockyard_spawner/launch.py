"""From root to a worker: open what it may see, fork, join its cgroup, give up every privilege, become bwrap."""

import contextlib
import ctypes
import fcntl
import os
import resource
import select
import signal
import struct
from collections.abc import Callable, Mapping
from functools import partial

import prctl

from blockyard_spawner.policy import Source
from blockyard_spawner.protocol import Refused

_OPENAT2, _CLONE3 = 437, 435  # system calls' numbers, the same on every architecture
_CLONE_PIDFD, _CLONE_INTO_CGROUP = 1 << 12, 1 << 33
_RESOLVE = 0x02 | 0x04 | 0x08  # RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_EXEC_MILLISECONDS = 2000
_ABOVE = 128  # every descriptor that a program is given is below

Drop = Callable[[], None]
Started = tuple[int, int]  # pid and pidfd

_libc = ctypes.PyDLL(None, use_errno=True)  # keeps Python's lock over a call: the child of clone3 has it, too


def open_source(source: Source) -> int:
    """Open a directory beneath its root, following no link on the way. Raises Refused ``no_such_<kind>``."""
    how = struct.pack("QQQ", _DIRECTORY, 0, _RESOLVE)
    root = os.open(source.root, _DIRECTORY)
    descriptor: int = _libc.syscall(_OPENAT2, root, source.name.encode(), how, len(how))
    os.close(root)
    if descriptor < 0:
        reason = os.strerror(ctypes.get_errno())
        raise Refused(f"no_such_{source.kind}", f"Check {source.name} in {source.root}, without links: {reason}.")
    return descriptor


def open_contents(data: bytes) -> int:
    """Give bytes as a descriptor that is read from its start."""
    descriptor = os.memfd_create("blockyard", os.MFD_CLOEXEC)
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def become(uid: int, gid: int) -> None:
    """Turn root into a worker's uid for good: each step in the order in which it must happen, then the proof."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    prctl.cap_effective.limit()
    prctl.cap_permitted.limit()
    prctl.cap_inheritable.limit()
    stay(uid, gid)
    for regain in (partial(os.setresuid, 0, 0, 0), partial(os.setresgid, 0, 0, 0), partial(os.setgroups, [0])):
        with contextlib.suppress(PermissionError):
            regain()
            raise RuntimeError("privilege could be had back after it was dropped")


def stay(_uid: int, _gid: int) -> None:
    """Gain nothing by exec, and let bwrap write its uid map: a uid change had cleared `dumpable`."""
    prctl.set_no_new_privs(1)
    prctl.set_dumpable(1)


def signal_as(drop: Drop, pid: int, number: int) -> None:
    """Send a signal from a child that is the worker's uid: a pid that was used again meanwhile is out of its reach."""
    if (child := os.fork()) == 0:
        with contextlib.suppress(Exception):  # the process may be gone: that is what a signal is for
            drop()
            os.kill(pid, number)
        os._exit(0)
    os.waitpid(child, 0)


def start(drop: Drop, argv: list[str], env: Mapping[str, str], log: int, passed: list[int], cgroup: str) -> Started:
    """Fork and exec; return pid and pidfd once the program runs. Raises Refused ``exec_failed``.

    The program's descriptors are /dev/null, twice `log`, and from 3 on those in `passed`; `cgroup` may be "".
    """
    failed, report = os.pipe2(os.O_CLOEXEC)
    pid, pidfd = _fork(cgroup)
    if pid == 0:
        report = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
        try:
            _enter(drop, argv, env, [log, log, *passed], report)
        except BaseException as error:  # noqa: BLE001 - a forked child has nowhere to raise to
            os.write(report, str(error).encode()[:512])
        os._exit(127)
    os.close(report)
    waiting = select.poll()
    waiting.register(failed)
    message = os.read(failed, 512).decode() if waiting.poll(_EXEC_MILLISECONDS) else ""  # a later end is an exit
    os.close(failed)
    if message:
        os.waitpid(pid, 0)
        os.close(pidfd)
        raise Refused("exec_failed", f"Check that {argv[0]} runs: {message}.")
    return pid, pidfd


def _fork(cgroup: str) -> Started:
    """Fork into a cgroup: the child is never outside. To join one later waits for all processors, 10 ms and more."""
    if not cgroup:
        pid = os.fork()
        return pid, os.pidfd_open(pid) if pid else -1
    directory, pidfd = os.open(cgroup, _DIRECTORY), ctypes.c_int(-1)
    flags, pointer = _CLONE_PIDFD | _CLONE_INTO_CGROUP, ctypes.addressof(pidfd)
    arguments = struct.pack("11Q", flags, pointer, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, directory)
    pid = _libc.syscall(_CLONE3, arguments, len(arguments))
    failure = ctypes.get_errno()
    os.close(directory)
    if pid < 0:
        raise OSError(failure, os.strerror(failure), cgroup)
    return pid, pidfd.value


def _enter(drop: Drop, argv: list[str], env: Mapping[str, str], given: list[int], report: int) -> None:
    """Be the child: one straight way to exec."""
    given = [os.open(os.devnull, os.O_RDONLY), *given]
    for target, copy in enumerate([fcntl.fcntl(descriptor, fcntl.F_DUPFD, _ABOVE) for descriptor in given]):
        os.dup2(copy, target)
    os.closerange(len(given), report)
    os.closerange(report + 1, os.sysconf("SC_OPEN_MAX"))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores these two, and exec would pass that on
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    os.umask(0o077)
    drop()
    os.execve(argv[0], argv, {name.encode(): value.encode() for name, value in env.items()})  # noqa: S606
