"""What a process that reads a hostile archive can still open and reach, should its parser be taken over."""

import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from bpf import run

from blockyard_api.bundles import confinement
from blockyard_api.hardening import bpf

TRIES = """
import ctypes, errno, fcntl, json, os, resource, signal, socket, sys
import prctl
from blockyard_api.bundles.confinement import reach_nobody, stay_below

def told(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def shoot():
    fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
    os.write(writing, b"x")

inside, outside, victim = *sys.argv[1:3], int(sys.argv[3])
opened = open(outside)
reading, writing = os.pipe()
other, _ = socket.socketpair()
prctl.set_no_new_privs(1)
can = True
if os.environ["CONFINED"] == "1":
    reach_nobody()
    can = stay_below(os.open(inside, os.O_DIRECTORY))
print(json.dumps({
    "can": can,
    "read outside": told(lambda: open(outside).close()),
    "list outside": told(lambda: os.listdir(os.path.dirname(outside))),
    "write outside": told(lambda: open(outside + ".new", "w").close()),
    "remove outside": told(lambda: os.remove(outside + ".old")),
    "connect": told(lambda: socket.socket(socket.AF_UNIX).connect(f"{outside}.socket")),
    "signal its parent": told(lambda: os.kill(os.getppid(), 0)),
    "signal by pidfd": told(lambda: signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)),
    "limit another": told(lambda: resource.prlimit(victim, resource.RLIMIT_CORE, (0, 0))),
    "slow another down": told(lambda: os.setpriority(os.PRIO_PROCESS, victim, 1)),
    "take processors from another": told(lambda: os.sched_setaffinity(victim, os.sched_getaffinity(0))),
    "schedule another": told(lambda: os.sched_setscheduler(victim, os.SCHED_BATCH, os.sched_param(0))),
    "change a mode outside": told(lambda: os.chmod(outside, 0o777)),
    "change an owner outside": told(lambda: os.chown(outside, -1, os.getgid())),
    "change times outside": told(lambda: os.utime(outside)),
    "change attributes outside": told(lambda: os.setxattr(outside, "user.a", b"a")),
    "open outside neither to read nor to write": told(lambda: os.fchmod(os.open(outside, os.O_ACCMODE), 0o777)),
    "truncate outside": told(lambda: os.truncate(outside + ".long", 0)),
    "choose a pipe's signal": told(lambda: fcntl.fcntl(reading, fcntl.F_SETSIG, signal.SIGKILL)),
    "let a socket signal another": told(lambda: fcntl.ioctl(other, 0x8901, ctypes.c_int(victim))),
    "let a pipe signal another": told(lambda: fcntl.fcntl(reading, fcntl.F_SETOWN, victim)),
    "let a pipe signal a thread": told(lambda: fcntl.fcntl(reading, 15, bytes((ctypes.c_int * 2)(1, victim)))),
    "shoot": told(shoot),
    "run": told(lambda: os.execve("/nonexistent" if os.environ["CONFINED"] == "0" else "/bin/true", ["true"], {})),
    "an open file": opened.read(),
    "make a directory": told(lambda: os.mkdir(f"{inside}/a")),
    "make a file": told(lambda: open(f"{inside}/a/file", "w").close()),
    "change its mode": told(lambda: os.fchmod(os.open(f"{inside}/a/file", os.O_RDONLY), 0o755)),
    "link it": told(lambda: os.link(f"{inside}/a/file", f"{inside}/other")),
    "make a symbolic link": told(lambda: os.symlink("a/file", f"{inside}/symbolic")),
    "make a FIFO": told(lambda: os.mkfifo(f"{inside}/fifo")),
    "make a socket": told(lambda: socket.socket(socket.AF_UNIX)),
}))
"""
OUTSIDE = ("read outside", "list outside", "write outside", "remove outside", "run", "make a FIFO")
REACHED = ("connect", "signal its parent", "signal by pidfd", "make a socket")
REACHED += ("limit another", "slow another down", "take processors from another", "schedule another")
REACHED += ("choose a pipe's signal", "let a pipe signal another", "let a pipe signal a thread")
REACHED += ("let a socket signal another",)
CHANGED = ("change a mode outside", "change an owner outside", "change times outside", "change attributes outside")
CHANGED += ("open outside neither to read nor to write", "truncate outside")
WITHHELD = """
import errno, os, sys
import prctl
from blockyard_api.bundles.confinement import stay_below
from blockyard_api.hardening import bpf

prctl.set_no_new_privs(1)
bpf.load(sys.stdin.buffer.read())
try:
    print(stay_below(os.open(sys.argv[1], os.O_DIRECTORY)), end="")
except OSError as error:
    print(errno.errorcode[error.errno], end="")
"""
INSIDE = ("make a directory", "make a file", "change its mode", "link it", "make a symbolic link")

EPERM = bpf.ERRNO | errno.EPERM
ONES = (1 << 64) - 1
UNKNOWN = -1  # to libseccomp
# Since Linux 6.13 and 6.17, which the libseccomp of today's Debian does not know: from the kernel's own tables.
LATER = {"setxattrat": 463, "removexattrat": 466, "file_setattr": 469}
UNPACKING = (
    "read",
    "write",
    "close",
    "fstat",
    "fchmod",
    "mkdirat",
    "linkat",
    "symlinkat",
    "mmap",
    "sync",
    "exit_group",
)
# Call → which argument, values that are refused, and values beside them that are not.
BY_ARGUMENT = {
    "fcntl": (1, (8, 10, 15), (0, 1, 2, 3, 4, 7, 9, 11, 14, 16, 1030)),
    "ioctl": (1, (0x8901, 0x8902), (0x5401, 0x5413, 0x5451, 0x8903)),
    "prctl": (0, (62,), (0, 15, 38, 61, 63)),
    "open": (1, (3, 0o1003, 0x80003, ONES), (0, 1, 2, 0x80000, 0x800C2)),
    "openat": (2, (3, 0o1003, 0x80003, ONES), (0, 1, 2, 0x80000, 0x800C2)),
}


def tried(directory, confined):
    """Return what the tries came to, and the signal that ended a process that took no part in them."""
    inside, outside = directory / "inside", directory / "outside"
    inside.mkdir(parents=True)
    outside.write_text("of the server")
    (directory / "outside.old").write_text("")
    (directory / "outside.long").write_text("of the server")
    listener = socket.socket(socket.AF_UNIX)  # as the spawner's: whoever has this uid may connect
    listener.bind(f"{outside}.socket")
    listener.listen()
    environ = {**os.environ, "CONFINED": str(int(confined))}
    with listener, subprocess.Popen(["sleep", "30"]) as victim:
        argv = [sys.executable, "-c", TRIES, inside, outside, str(victim.pid)]
        told = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE, env=environ, timeout=30).stdout)
        victim.terminate()  # of no effect on one that SIGKILL has ended
        return told, signal.Signals(-victim.wait())


def test_it_opens_and_makes_files_in_its_directory_alone_and_reaches_nobody(tmp_path):
    told, ended_by = tried(tmp_path / "confined", confined=True)
    assert told["can"], "this kernel has no Landlock"
    assert {name: told[name] for name in OUTSIDE} == dict.fromkeys(OUTSIDE, "EACCES")
    assert {name: told[name] for name in REACHED} == dict.fromkeys(REACHED, "EPERM")
    assert {name: told[name] for name in CHANGED} == dict.fromkeys(CHANGED, "EPERM")
    assert {name: told[name] for name in INSIDE} == dict.fromkeys(INSIDE, "done")
    assert told["an open file"] == "of the server"
    assert ended_by == signal.SIGTERM
    assert (tmp_path / "confined" / "outside.long").read_text() == "of the server"


def test_without_it_all_of_that_is_possible(tmp_path):
    told, ended_by = tried(tmp_path / "free", confined=False)
    assert told.pop("run") == "ENOENT"
    assert {name for name, how in told.items() if how != "done"} == {"can", "an open file"}
    assert ended_by == signal.SIGKILL


@pytest.mark.parametrize(("answer", "told"), [("ENOSYS", "False"), ("EOPNOTSUPP", "False"), ("EPERM", "EPERM")])
def test_a_kernel_may_lack_landlock_but_nobody_may_withhold_it(tmp_path, answer, told):
    number, errno_ = confinement._CREATE_RULESET, getattr(errno, answer)
    refusing = [(bpf.LOAD, 0, 0, 0), (bpf.JUMP_IF_EQUAL, 0, 1, number), (bpf.RETURN, 0, 0, bpf.ERRNO | errno_)]
    program = bpf.packed([*refusing, (bpf.RETURN, 0, 0, bpf.ALLOW)])
    argv = [sys.executable, "-c", WITHHELD, tmp_path]
    assert subprocess.run(argv, check=True, input=program, stdout=subprocess.PIPE, timeout=30).stdout.decode() == told


def resolved(call, architecture):
    """Return a call's number, or None where the architecture has no such call."""
    resolve = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name_arch
    number = resolve(ctypes.c_uint32(bpf.ARCHITECTURES[architecture]), call.encode())
    if number == UNKNOWN:
        return LATER[call]
    return number if number >= 0 else None


@pytest.fixture(params=sorted(bpf.ARCHITECTURES))
def answer(request):
    """A function from a call and its arguments to the filter's answer; None for a call that there is not."""
    program, token = confinement.instructions(request.param), bpf.ARCHITECTURES[request.param]

    def answered(call, arguments=()):
        number = resolved(call, request.param) if isinstance(call, str) else call
        return None if number is None else run(program, number, token, arguments)

    return answered


@pytest.mark.parametrize("call", confinement.REFUSED)
def test_what_reaches_others_is_refused_whatever_the_arguments(call, answer):
    for arguments in ((0,) * 6, (ONES,) * 6, (1, 2, 3, 4, 5, 6)):
        assert answer(call, arguments) in (EPERM, None)


@pytest.mark.parametrize("call", BY_ARGUMENT)
def test_an_argument_is_refused_whatever_stands_in_its_upper_half(call, answer):
    at, refused, allowed = BY_ARGUMENT[call]
    for value, wanted in [*((value, EPERM) for value in refused), *((value, bpf.ALLOW) for value in allowed)]:
        for upper in (0, 1 << 32, 1 << 63):
            arguments = [0] * 6
            arguments[at] = value | upper
            assert answer(call, arguments) in (wanted, None), hex(value | upper)


@pytest.mark.parametrize("call", UNPACKING)
def test_what_unpacking_takes_is_left(call, answer):
    assert answer(call, (3,) * 6) == bpf.ALLOW


@pytest.mark.parametrize("architecture", sorted(bpf.ARCHITECTURES))
def test_no_number_is_refused_but_those_of_the_named_calls(architecture):
    program, token = confinement.instructions(architecture), bpf.ARCHITECTURES[architecture]
    refused = {number for number in range(1024) if run(program, number, token) == EPERM}
    assert refused == {resolved(call, architecture) for call in confinement.REFUSED} - {None}


def test_no_call_goes_by_the_numbers_of_another_table(answer):
    x32 = 1 << 30
    assert answer(x32 | 62) == EPERM


@pytest.mark.parametrize("architecture", sorted(bpf.ARCHITECTURES))
def test_calls_of_another_architecture_end_the_process(architecture):
    i386, arm = 0x40000003, 0x40000028
    assert run(confinement.instructions(architecture), 0, i386) == bpf.KILL_PROCESS
    assert run(confinement.instructions(architecture), 0, arm) == bpf.KILL_PROCESS
