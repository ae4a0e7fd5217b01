"""From root to a worker: open what it may see, fork into its cgroup, give up every privilege, become bwrap."""

import contextlib
import ctypes
import fcntl
import mmap
import os
import resource
import signal
import struct
from collections.abc import Mapping
from functools import partial

import prctl

from blockyard_spawner.policy import Source
from blockyard_spawner.protocol import Refused

# System calls' numbers, the same on every architecture.
_OPENAT2, _CLONE3, _LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 437, 435, 444, 446
_CLONE_PIDFD, _CLONE_VFORK, _CLONE_INTO_CGROUP = 1 << 12, 1 << 14, 1 << 33
_RESOLVE = 0x02 | 0x04 | 0x08  # RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_ABOVE = 128  # every descriptor that a program is given is below

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
    os.pwrite(descriptor, data, 0)
    return descriptor


def start(uid: int, gid: int, argv: list[str], env: Mapping[str, str], given: list[int], cgroup: str) -> Started:
    """Fork into a cgroup, or "", and exec as a worker; return once the program runs. Raises Refused ``exec_failed``.

    The program's descriptors are /dev/null, and from 1 on those `given`.
    """
    report = mmap.mmap(-1, 512)  # shared with the child, and no descriptor
    pid, pidfd = _fork(cgroup)
    if pid == 0:
        try:
            _enter(given)
            if os.geteuid() == 0:  # without root, the spawner has its workers' uid already
                _drop(uid, gid)
            prctl.set_no_new_privs(1)
            _leave_abstract_sockets()
            prctl.set_dumpable(1)  # a uid's change cleared it, and bwrap is to write its own uid map
            os.execve(argv[0], argv, env)  # noqa: S606
        except BaseException as error:  # noqa: BLE001 - a forked child has nowhere to raise to
            report.write(str(error).encode()[:512])
        finally:
            os._exit(127)
    if message := report[:].rstrip(b"\0").decode(errors="replace"):
        os.close(pidfd)
        os.waitpid(pid, 0)
        raise Refused("exec_failed", f"Check that {argv[0]} runs: {message}.")
    return pid, pidfd


def _fork(cgroup: str) -> Started:
    """Fork into a cgroup, and wait for the child's exec or end.

    The child is never outside: to join a cgroup later waits for all processors, 10 ms and more.
    """
    directory, pidfd = os.open(cgroup or "/", _DIRECTORY), ctypes.c_int(-1)
    flags = _CLONE_PIDFD | _CLONE_VFORK | (_CLONE_INTO_CGROUP if cgroup else 0)
    arguments = struct.pack("11Q", flags, ctypes.addressof(pidfd), 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, directory)
    pid = _libc.syscall(_CLONE3, arguments, len(arguments))
    failure = ctypes.get_errno()
    os.close(directory)
    if pid < 0:
        raise OSError(failure, os.strerror(failure), cgroup)
    return pid, pidfd.value


def _enter(given: list[int]) -> None:
    """Keep nothing of the spawner's but what is given."""
    given = [os.open(os.devnull, os.O_RDONLY), *given]
    for target, copy in enumerate([fcntl.fcntl(descriptor, fcntl.F_DUPFD, _ABOVE) for descriptor in given]):
        os.dup2(copy, target)
    os.closerange(len(given), os.sysconf("SC_OPEN_MAX"))
    # Blocked, not ignored: R has a handler that makes an error of it, and a log that nobody reads is no error.
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGPIPE])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores these two, and exec would pass that on
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    os.umask(0o077)


def _leave_abstract_sockets() -> None:
    """Keep what follows from abstract sockets outside of its sandbox, where the kernel can (Landlock's scope, 6.12).

    They belong to the network namespace, which an app with the host's network shares with everybody.
    """
    scoped = struct.pack("QQQ", 0, 0, 1)  # neither files nor ports: those rights would forbid bwrap to mount
    if (ruleset := _libc.syscall(_LANDLOCK_CREATE_RULESET, scoped, len(scoped), 0)) >= 0:
        _libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)


def _drop(uid: int, gid: int) -> None:
    """Turn root into a worker's uid for good: each step in the order in which it must happen, then the proof."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    prctl.set_caps((prctl.ALL_CAPS, prctl.ALL_FLAGS, False))
    for regain in (partial(os.setresuid, 0, 0, 0), partial(os.setresgid, 0, 0, 0), partial(os.setgroups, [0])):
        with contextlib.suppress(PermissionError):
            regain()
            raise RuntimeError("privilege could be had back after it was dropped")
