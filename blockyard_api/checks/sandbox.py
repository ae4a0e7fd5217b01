"""Whether workers can be started, and whether they are what they should be: spawner, bubblewrap, uids, filter."""

import asyncio
import os
import socket
import stat
from pathlib import Path

from blockyard_api.backends.peer import PeerUnknown, peer
from blockyard_api.backends.spawner import SpawnerRefused, SpawnerUnreachable
from blockyard_api.checks.context import UNUSED, Context, Outcome, Seen
from blockyard_api.checks.probe import ProbeFailed
from blockyard_api.checks.result import Result, error, info, ok, together, warning
from blockyard_api.hardening import bpf
from blockyard_api.host import child, container

_FILTERED = ("SECCOMP", "seccomp")
_INSTRUCTION = bpf.INSTRUCTION.size
_MOST_INSTRUCTIONS = 4096  # BPF_MAXINSNS


async def spawner_link(context: Context) -> Result:
    """Connect to the spawner, compare versions, and look at both ends' credentials."""
    name = "spawner_link"
    if not context.uses("process"):
        return ok(name, UNUSED)
    path = Path(context.settings.process.spawner_socket)
    at_socket = (str(path.parent), path.name, socket.SOCK_SEQPACKET)
    try:
        identity = await context.spawner.hello()
    except SpawnerRefused as failure:
        remedy = "Install the same version of both daemons, then restart both."
        return error(name, f"The spawner refuses to talk: {failure.message}", remedy)
    except SpawnerUnreachable as failure:
        try:
            await asyncio.to_thread(peer, *at_socket)
        except PeerUnknown:
            remedy = "Start it: 'systemctl start blockyard-spawner.socket'."
            return error(name, failure.message, remedy, passing=True)
        # somebody listens, and hangs up: that is how the spawner answers anybody but the user it obeys
        remedy = "Set process.api_user to the user that blockyard-api runs as, then restart the spawner."
        return error(name, f"The spawner closes the connection: it does not obey uid {os.geteuid()}.", remedy)
    found = await asyncio.to_thread(peer, *at_socket)
    expected = os.geteuid() if identity.unprivileged else 0
    if found.uid != expected:
        return error(
            name,
            f"Behind {path} is a process of uid {found.uid}, not the spawner.",
            "Find out who put it there; see 'systemctl status blockyard-spawner.socket'.",
        )
    user = "without root" if identity.unprivileged else "as root"
    free = f"{identity.uids_free} of {identity.uids_total} uids are free"
    return ok(name, f"The spawner answers with protocol version {identity.version}; it runs {user}, {free}.")


async def bwrap_available(context: Context) -> Result:
    """Run bubblewrap's --version; refuse one with rights of its own. Whether it makes a sandbox, the probe shows."""
    name, path = "bwrap_available", Path(context.settings.process.bwrap_path)
    if not context.uses("process"):
        return ok(name, UNUSED)
    try:
        if await asyncio.to_thread(_privileged, path):
            return error(
                name,
                f"{path} is setuid, setgid or has capabilities: a fault in it would be root's.",
                f"Run 'chmod u-s,g-s {path}' and 'setcap -r {path}'; user namespaces do without.",
            )
        version = await _output(str(path), "--version")
    except OSError as failure:
        remedy = "Install bubblewrap ('apt install bubblewrap'), or set process.bwrap_path."
        return error(name, f"{path} cannot be run: {failure.strerror}.", remedy)
    return ok(name, f"{path} is {version.strip():.60}, without privileges of its own.")


def _privileged(path: Path) -> bool:
    mode = path.stat().st_mode
    return bool(mode & (stat.S_ISUID | stat.S_ISGID)) or "security.capability" in os.listxattr(path)


async def _output(*argv: str) -> str:
    async with child.running(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"LANG": "C.UTF-8"},
    ) as process:
        output, _ = await process.communicate()
    return output.decode("utf-8", "replace")


async def user_namespaces(context: Context, seen: Seen) -> Result:
    """Judge by a real sandbox under a worker's uid; where there was none, say what forbade it."""
    name = "user_namespaces"
    if seen.worker is None:
        return ok(name, UNUSED)
    if not isinstance(seen.worker, ProbeFailed):
        return ok(name, f"A sandbox was made and left again under uid {seen.worker.uid}.")
    failure = seen.worker
    if why := _forbidden(failure, context.settings.process.bwrap_path):
        return error(name, *why)
    return failure.result(name)


def _forbidden(failure: ProbeFailed, bwrap: str) -> tuple[str, str] | None:
    """Return what keeps a worker from making its sandbox, and the remedy; None where the sandbox is not the reason.

    bubblewrap's own words tell the reasons apart, and the settings of the kernel where this daemon may read them.
    """
    words = failure.words
    if container.inside() and (why := _by_engine(failure)):
        return why
    denied = "namespace" in words and "Permission denied" in words
    mapped = "uid map" in words or "gid map" in words
    forbidden = "No permissions to creat" in words or _sysctl("kernel/unprivileged_userns_clone") == "0"
    spent = "max_" in words or _sysctl("user/max_user_namespaces") == "0"
    reasons = (
        (
            failure.code == "exec_failed",
            f"{bwrap} cannot be run by a worker: {failure.message}",
            "Install bubblewrap ('apt install bubblewrap').",
        ),
        (
            "Unknown option" in words,
            f"{bwrap} is too old for the sandbox.",
            "Install the distribution's present bubblewrap.",
        ),
        (
            "execvp" in words,
            "The sandbox has no program for the probe.",
            "Install python3 from the distribution.",
        ),
        (
            denied or mapped,
            "AppArmor, or another security module, denies a worker its user namespace.",
            "Run 'by admin install-apparmor' as root, then restart blockyard-spawner.",
        ),
        (
            forbidden,
            "The kernel denies user namespaces to ordinary users.",
            "Run 'sysctl kernel.unprivileged_userns_clone=1', and keep it in /etc/sysctl.d.",
        ),
        (
            spent,
            "No further user namespace may be made on this host.",
            "Raise 'sysctl user.max_user_namespaces', such as to 10000, and keep it in /etc/sysctl.d.",
        ),
        (
            "does not support user namespaces" in words,
            "This kernel has no user namespaces.",
            "Boot a kernel with CONFIG_USER_NS.",
        ),
    )
    said = f" It says: {words}" if words else ""
    return next(((f"{fact}{said}", remedy) for holds, fact, remedy in reasons if holds), None)


def _by_engine(failure: ProbeFailed) -> tuple[str, str] | None:
    """Return what a container's engine keeps from a worker, and the remedy."""
    words = failure.words
    said = f" It says: {words or failure.message}"
    if "mount proc" in words or "max_user_namespaces: Read-only" in words:
        fact = "The container engine hides parts of /proc, and so the kernel lets no sandbox mount one of its own."
        return (
            f"{fact}{said}",
            f"Start the container with {container.WHOLE_PROC}; docs/container.md says what it opens.",
        )
    if "mount" in words and "Permission denied" in words:
        fact = "AppArmor denies mounts in this container."
        return f"{fact}{said}", "Start the container with --security-opt apparmor=unconfined; see docs/container.md."
    filtered = ("No permissions to creat", "Operation not permitted", "Function not implemented")
    if any(each in words or each in failure.message for each in filtered):
        fact = "The container engine's system call filter keeps workers from making their sandbox."
        return f"{fact}{said}", f"Start the container with {container.PROFILE}."
    return None


def _sysctl(name: str) -> str | None:
    """Read a kernel setting; None where it is not there, or hidden from this daemon by its unit."""
    try:
        return Path("/proc/sys", name).read_text(encoding="ascii").strip()
    except OSError:
        return None


async def bwrap_host_uid_mapping(context: Context, seen: Seen) -> Result:
    """Compare the worker's ids, as the kernel tells them to the host, with the pool's uid and the workers' gid.

    /proc would say the same, but this daemon's unit hides other processes from it; SO_PEERCRED of a socket that the
    probe listens on is the kernel's word just as well.
    """
    name, process = "bwrap_host_uid_mapping", context.settings.process
    if seen.worker is None:
        return ok(name, UNUSED)
    identity = await context.spawner.hello()
    if identity.unprivileged:
        return info(
            name,
            "The spawner has no root, so that all workers share its uid: they are kept apart by namespaces alone.",
            "Run the spawner as root, with cgroup delegation, or use the Docker backend for apps of different owners.",
        )
    if isinstance(seen.worker, ProbeFailed):
        return seen.worker.result(name)
    report, pool = seen.worker, range(process.worker_uid_range_start, process.worker_uid_range_end + 1)
    told = f"uid {report.peer.uid} and gid {report.peer.gid}"
    if report.peer.uid != report.uid or report.peer.uid not in pool or report.inner_uid != report.uid:
        wanted = f"uid {report.uid} of the range {pool.start}-{pool.stop - 1}"
        remedy = "Restart blockyard-spawner if the configuration was changed; otherwise report this."
        return error(name, f"The host sees a worker with {told}, but it should have {wanted}.", remedy)
    if report.peer.gid != process.worker_gid or report.inner_gid != process.worker_gid:
        remedy = "Restart blockyard-spawner: process.worker_gid was changed since it started."
        return error(name, f"The host sees a worker with {told}, but it should have gid {process.worker_gid}.", remedy)
    return ok(name, f"The host sees a worker with {told}, as configured.")


async def seccomp_profile(context: Context, seen: Seen) -> Result:
    """Look at the filter's file, and whether a worker runs under it; a Docker worker runs under the engine's."""
    name = "seccomp_profile"
    found = (
        [] if seen.worker is None else [await _own_filter(name, context.settings.process.seccomp_profile, seen.worker)]
    )
    found += [] if seen.docker is None else [_engines_filter(name, seen.docker)]
    return together(name, found)


def _engines_filter(name: str, worker: Outcome) -> Result:
    if isinstance(worker, ProbeFailed):
        return worker.result(name)
    if not worker.filtered:
        remedy = 'Take the seccomp-profile that is "unconfined" out of the engine\'s daemon.json, then restart it.'
        return warning(name, "A Docker worker may make any system call: the engine's filter is off.", remedy)
    return ok(name, "A Docker worker runs under the engine's filter.")


async def _own_filter(name: str, path: str, worker: Outcome) -> Result:
    if not path:
        remedy = "Set process.seccomp_profile, then restart both daemons."
        return warning(name, "Workers may make any system call: process.seccomp_profile is empty.", remedy)
    install = "Run 'by admin install-seccomp' as root, then restart blockyard-spawner."
    try:
        size = await asyncio.to_thread(lambda: len(Path(path).read_bytes()))
    except OSError as failure:
        return error(name, f"{path} cannot be read: {failure.strerror}.", install)
    if size == 0 or size % _INSTRUCTION or size > _MOST_INSTRUCTIONS * _INSTRUCTION:
        return error(name, f"{path} is no filter: it has {size} bytes, and an instruction has {_INSTRUCTION}.", install)
    return _in_force(name, path, size // _INSTRUCTION, worker, install)


def _in_force(name: str, path: str, instructions: int, worker: Outcome, install: str) -> Result:
    if isinstance(worker, ProbeFailed):
        if any(word in worker.words for word in _FILTERED):
            return error(name, f"{path} does not load: {worker.words}", install)
        return worker.result(name)
    restart = "Restart blockyard-spawner: it reads the filter when it starts."
    if not worker.filtered:
        return error(name, f"A worker runs without a filter, although {path} is configured.", restart)
    if worker.typing != "EPERM":
        fact = f"A worker may type into terminals, which our own filter denies: {path} is another, or not in force."
        return warning(name, fact, restart)
    return ok(name, f"A worker runs under {path} ({instructions} instructions).")
