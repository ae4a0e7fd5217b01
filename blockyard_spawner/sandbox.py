"""The sandbox as an argument list for bwrap. Pure: to read this table is to read what a worker can see.

The root is bwrap's own empty tmpfs, filled by allow-list and read-only in the end. No destination lies below a bind:
a link inside the bind would be followed when bwrap makes the mount point (CVE-2026-87766).
"""

import itertools
from collections.abc import Mapping
from typing import Any

from blockyard_spawner.policy import Launch

# What runs inside, by the request's kind: a file of ./sandboxed, which root hands over and never runs.
PROGRAMS = {"app": "launch.R", "probe": "probe.py"}
PLACE = "/run/blockyard"
_R_OPTIONS = ("--no-echo", "--no-restore", "--no-save", "--no-init-file", f"--file={PLACE}/launch.R")
_NAMESPACES = ("--unshare-user", "--disable-userns", "--unshare-pid", "--unshare-ipc", "--unshare-uts")
_READABLE = (
    *("/usr", "/opt/R"),  # the latter: where other makers put versions of R
    *("/etc/R", "/etc/alternatives", "/etc/ld.so.cache"),  # libblas and libR are links into alternatives
    *("/etc/fonts", "/var/cache/fontconfig"),  # without the cache the first plot scans every font
    *("/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/mime.types", "/etc/localtime", "/etc/timezone"),
)
_RESOLVER = ("/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/hosts", "/etc/host.conf", "/etc/services")


def files(config: Mapping[str, Any], uid: int, kind: str, program: bytes) -> dict[str, bytes]:
    """Name the files that are made for a worker, and their contents."""
    gid = config["process.worker_gid"]
    passwd, group = f"worker:x:{uid}:{gid}::/tmp:/usr/sbin/nologin\n".encode(), f"worker:x:{gid}:\n".encode()
    return {"/etc/passwd": passwd, "/etc/group": group, f"{PLACE}/{PROGRAMS[kind]}": program}


def command(r_path: str, kind: str) -> tuple[str, ...]:
    """Name what runs inside, and its arguments."""
    return ("/usr/bin/python3", "-I", f"{PLACE}/probe.py") if kind == "probe" else (r_path, *_R_OPTIONS)


def bwrap_argv(config: Mapping[str, Any], launch: Launch, made: Mapping[str, bytes], *, lasting: bool) -> list[str]:
    """Build the list. Descriptors from 3 on: the sources in order, the files in order, the seccomp filter if any."""
    descriptor = map(str, itertools.count(3))
    isolated = launch.network == "none"
    argv = [config["process.bwrap_path"], *_NAMESPACES, "--unshare-cgroup", *(["--unshare-net"] if isolated else [])]
    argv += ["--new-session", "--cap-drop", "ALL", "--hostname", "worker"]
    argv += [] if lasting else ["--die-with-parent"]  # without a cgroup nothing could find it again
    for path in _READABLE if isolated else (*_READABLE, *_RESOLVER):
        argv += ["--ro-bind-try", path, path]
    for name in ("bin", "lib", "lib64", "sbin"):
        argv += ["--symlink", f"usr/{name}", f"/{name}"]
    for source in launch.sources:
        argv += ["--bind-fd" if source.writable else "--ro-bind-fd", next(descriptor), source.target]
    for target in made:
        argv += ["--perms", "0444", "--file", next(descriptor), target]
    argv += ["--proc", "/proc", "--dev", "/dev", "--size", str(64 << 20), "--tmpfs", "/dev/shm"]  # noqa: S108
    argv += ["--size", str(launch.limits.tmp), "--tmpfs", "/tmp"]  # noqa: S108
    argv += ["--bind", f"{config['process.runtime_dir']}/{launch.request.id}", "/run/worker"]
    argv += ["--remount-ro", "/dev", "--remount-ro", "/"]
    if config["process.seccomp_profile"]:
        argv += ["--seccomp", next(descriptor)]
    # The environment is bwrap's own, out of the world-readable command line. The app's name is no secret, and is
    # where a restarted spawner reads it.
    argv += ["--setenv", "BLOCKYARD_APP", launch.request.app, "--chdir", launch.directory, "--"]
    return [*argv, *command(config["process.r_path"], launch.request.kind)]
