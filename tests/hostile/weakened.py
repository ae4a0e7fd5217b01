"""Runs a command in a worker's very sandbox, but for named layers that are switched off: python weakened.py --help.

What a layer stops must succeed without it, or be stopped by the next one; otherwise the test of that layer proves
nothing. Run as root and with the server's own interpreter: the command line is the one that the spawner would build.
"""

import argparse
import contextlib
import fcntl
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import termios
import time
from pathlib import Path
from types import SimpleNamespace

from layers import ABSTRACT, DESCRIPTORS, FILTER, OPEN_FILES, TERMINAL

from blockyard_api.hardening import bpf, seccomp
from blockyard_spawner import config as configuration
from blockyard_spawner import launch, policy, protocol, sandbox


def without(argv, *words):
    """Take words that stand side by side out of a list."""
    for at in range(len(argv)):
        if argv[at : at + len(words)] == list(words):
            return argv[:at] + argv[at + len(words) :]
    raise SystemExit(f"{words} is no part of the sandbox: correct the test")


def sizes(argv):
    """Take the size off each tmpfs."""
    while "--size" in argv:
        at = argv.index("--size")
        argv = argv[:at] + argv[at + 2 :]
    return argv


def in_place_of(argv, old, new):
    """Put words in the place of others."""
    at = next((at for at in range(len(argv)) if argv[at : at + len(old)] == old), None)
    if at is None:
        raise SystemExit(f"{old} is no part of the sandbox: correct the test")
    return argv[:at] + new + argv[at + len(old) :]


# Each layer that lies in bwrap's command line → how it is switched off there.
LAYERS = {
    # Without a process namespace of its own, bwrap may not mount a new /proc: the host's takes its place.
    "the process namespace": lambda argv: in_place_of(
        without(argv, "--unshare-pid"), ["--proc", "/proc"], ["--bind", "/proc", "/proc"]
    ),
    "the IPC namespace": lambda argv: without(argv, "--unshare-ipc"),
    "the network namespace": lambda argv: without(argv, "--unshare-net"),
    "the host name's namespace": lambda argv: without(without(argv, "--unshare-uts"), "--hostname", "worker"),
    "the ban on user namespaces": lambda argv: without(argv, "--disable-userns"),
    "the session of its own": lambda argv: without(argv, "--new-session"),
    "the read-only root": lambda argv: without(argv, "--remount-ro", "/"),
    "the sizes": sizes,
}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--bundle", required=True, help="below bundles/ in the state directory")
    parser.add_argument("--uid", type=int, help="default: the last of the pool, which hardly any worker gets")
    parser.add_argument("--network", default="none")
    parser.add_argument("--off", action="append", default=[], help="a layer to switch off")
    parser.add_argument("--show", action="append", default=[], help="a path of the host to add to the root, as it is")
    parser.add_argument("--words", action="append", default=[], help="words for bwrap after all mounts, by blanks")
    parser.add_argument("--refused-with", help="the error that the filter is to answer with in place of its own")
    parser.add_argument("--kill-outer", action="store_true", help="kill the outer process and count what lives on")
    parser.add_argument("--may-fail", action="store_true", help="bwrap's own refusal is an answer, too")
    parser.add_argument("--within", type=float, default=60)
    parser.add_argument("command")
    return parser.parse_args()


def main():
    asked = parse()
    config = {**configuration.load(asked.config, os.environ, configuration.KEYS)}
    off = set(asked.off)
    asked.uid = asked.uid or config["process.worker_uid_range_end"]
    if FILTER in off:
        config["process.seccomp_profile"] = ""
    work = Path(tempfile.mkdtemp(prefix="weakened-", dir="/run"))
    if asked.refused_with:
        marked = seccomp.compiled({**seccomp.read_policy(), "otherwise": asked.refused_with}, bpf.native())
        config["process.seccomp_profile"] = str(work / "marked.bpf")
        Path(config["process.seccomp_profile"]).write_bytes(marked)
    config["process.runtime_dir"] = str(work)
    work.chmod(0o711)
    (work / "weakened-worker").mkdir(mode=0o700)
    os.chown(work / "weakened-worker", asked.uid, config["process.worker_gid"])
    request = protocol.Spawn(1, "weakened-worker", "app", "weakened", bundle=asked.bundle, network=asked.network)
    wanted = policy.authorize(config, request)
    made = sandbox.files(config, asked.uid, "app", b"")
    argv = sandbox.bwrap_argv(config, wanted, made, lasting=True)
    argv = [*argv[: argv.index("--")], *[word for words in asked.words for word in words.split()]]
    for name in off - {ABSTRACT, TERMINAL, DESCRIPTORS, OPEN_FILES, FILTER}:
        argv = LAYERS[name](argv)
    at = argv.index("--remount-ro")
    argv[at:at] = [word for path in asked.show for word in ("--bind", path, path)]
    argv += ["--", "/bin/sh", "-c", asked.command]
    if ABSTRACT in off:
        launch._leave_abstract_sockets = lambda: None
    if OPEN_FILES in off:
        resource.setrlimit(resource.RLIMIT_NOFILE, (20_000, 20_000))
        launch.resource = SimpleNamespace(setrlimit=lambda *_: None, RLIMIT_CORE=0, RLIMIT_NOFILE=0)

    reading, writing = terminal() if TERMINAL in off else os.pipe2(os.O_CLOEXEC)
    given = [writing, writing, *map(launch.open_source, wanted.sources)]
    filters = [config["process.seccomp_profile"]] if config["process.seccomp_profile"] else []
    given += [launch.open_contents(data) for data in (*made.values(), *(Path(name).read_bytes() for name in filters))]
    if DESCRIPTORS in off:
        given.append(os.open("/", os.O_RDONLY | os.O_DIRECTORY))
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    cgroup = Path(next(line.split()[4] for line in mounts if " - cgroup2 " in line)) / work.name
    cgroup.mkdir()
    try:
        pid, pidfd = launch.start(asked.uid, config["process.worker_gid"], argv, wanted.env, given, str(cgroup))
        for descriptor in {writing, *given[2:]}:
            os.close(descriptor)
        relay(reading, pidfd, asked)
        if asked.kill_outer:
            os.kill(pid, signal.SIGKILL)
            time.sleep(1)
            os.waitpid(pid, 0)
            sys.stdout.write(f"outlived by {len((cgroup / 'cgroup.procs').read_text().split())}\n")
    finally:
        while "populated 1" in (cgroup / "cgroup.events").read_text():
            (cgroup / "cgroup.kill").write_text("1")
            time.sleep(0.02)
        cgroup.rmdir()
        shutil.rmtree(work)


def terminal():
    """Give a terminal that is this process's controlling one, as a login would have it."""
    os.setsid()
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    return master, slave


def relay(reading, pidfd, asked):
    """Print what the command prints, until it ends or its time is over."""
    waiting = select.poll()
    waiting.register(reading, select.POLLIN)
    waiting.register(pidfd, select.POLLIN)
    end = time.monotonic() + asked.within
    while time.monotonic() < end:
        ready = dict(waiting.poll(1000))
        if ready.get(reading, 0) & select.POLLIN:
            with contextlib.suppress(OSError):  # a terminal whose other side has gone
                text = os.read(reading, 65536).decode(errors="replace")
                sys.stdout.write(text)
                if asked.kill_outer and "forked" in text:
                    return
        elif ready:
            break
    sys.stdout.flush()


main()
