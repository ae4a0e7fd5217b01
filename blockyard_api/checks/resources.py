"""Uids and limits: whether workers have what is theirs alone, and no more than they are given."""

import asyncio
import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from blockyard_api.checks.context import UNUSED, Context, Outcome, Seen
from blockyard_api.checks.probe import ProbeFailed, Report
from blockyard_api.checks.result import Result, info, ok, warning
from blockyard_api.host import accounting, container, units

_CONTROLLERS = ("memory", "cpu", "pids")
_DYNAMIC = range(61184, 65520)  # systemd's DynamicUser=
_HOMED = range(60001, 60514)
_HOMED_RUNS = Path("/run/systemd/userdb/io.systemd.Home")
_MODULE = "xt_cgroup"
_MOUNTINFO, _SYSTEMD = Path("/proc/self/mountinfo"), Path("/run/systemd/system")
_AS_A_WHOLE = (
    "Limit the container as a whole (--memory, --cpus, --pids-limit), and use the Docker backend for apps that must "
    "not starve one another; docs/container.md says what can be delegated."
)


async def uid_range(context: Context) -> Result:
    """Compare the workers' uids with everybody else's."""
    name, process = "uid_range", context.settings.process
    if not context.uses("process"):
        return ok(name, UNUSED)
    pool = range(process.worker_uid_range_start, process.worker_uid_range_end + 1)
    problems = await asyncio.to_thread(lambda: [*_overlaps(pool)])
    most = context.settings.proxy.max_workers
    if len(pool) < most:
        problems.append(f"it has {len(pool)} uids for proxy.max_workers = {most}")
    if problems:
        remedy = "Choose process.worker_uid_range_start and _end so that the range is the workers' alone."
        return warning(name, f"The workers' uids {pool.start}-{pool.stop - 1}: {'; '.join(problems)}.", remedy)
    return ok(name, f"The uids {pool.start}-{pool.stop - 1} are the workers' alone, and enough for {most} of them.")


def _overlaps(pool: range) -> Iterator[str]:
    users = [fields for fields in _fields(Path("/etc/passwd"), 3) if int(fields[2]) in pool]
    if users:
        others = f" and {len(users) - 3} more" if len(users) > 3 else ""
        yield "in it is " + ", ".join(f"{fields[0]} ({fields[2]})" for fields in users[:3]) + f"{others} of /etc/passwd"
    for fields in _fields(Path("/etc/subuid"), 3):
        theirs = range(int(fields[1]), int(fields[1]) + int(fields[2]))
        if _meet(pool, theirs):
            yield f"it overlaps {theirs.start}-{theirs.stop - 1}, {fields[0]}'s of /etc/subuid"
    if _meet(pool, _DYNAMIC):
        yield f"it overlaps {_DYNAMIC.start}-{_DYNAMIC.stop - 1}, which systemd gives to services with DynamicUser="
    if _meet(pool, _HOMED) and _HOMED_RUNS.exists():
        yield f"it overlaps {_HOMED.start}-{_HOMED.stop - 1}, which systemd-homed gives to people, and it is active"


def _fields(path: Path, least: int) -> Iterator[list[str]]:
    """Yield the lines of a file like passwd(5) whose numbers are numbers."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) >= least and fields[2].isdecimal() and (path.name != "subuid" or fields[1].isdecimal()):
            yield fields


def _meet(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


async def cgroup_delegation(context: Context, seen: Seen) -> Result:
    """Say which controllers limit workers, and the path that a firewall can match."""
    name = "cgroup_delegation"
    if seen.worker is None:
        return ok(name, UNUSED)
    identity = await context.spawner.hello()
    missing = [controller for controller in _CONTROLLERS if controller not in identity.controllers]
    if container.inside() and missing:
        fact = f"No worker has limits of its own in this container: it may not use {', '.join(missing)} of its cgroup."
        return warning(name, fact, _AS_A_WHOLE)
    if accounting.cgroup2_mount() is None:
        return warning(name, "There is no cgroup2 mount: no worker can be limited.", "Boot with the unified hierarchy.")
    if not await _is_delegated(seen.worker):
        remedy = f"Take away the drop-in that sets Delegate= of {units.WORKERS}, then restart that unit."
        return warning(name, f"{units.WORKERS} has no Delegate=yes: systemd may undo what limits workers.", remedy)
    if missing:
        fact = f"Not delegated: {', '.join(missing)}; delegated: {', '.join(identity.controllers) or 'none'}."
        mounts = await asyncio.to_thread(_MOUNTINFO.read_text, encoding="utf-8")
        why, remedy = _undelegated(missing, in_v1(mounts), systemd=await asyncio.to_thread(_SYSTEMD.is_dir))
        return warning(name, f"{fact}{why}", remedy)
    return await _with_path(name, seen.worker)


def _undelegated(missing: list[str], elsewhere: set[str], *, systemd: bool) -> tuple[str, str]:
    """Say what keeps controllers from workers, and what to do."""
    if held := [controller for controller in missing if controller in elsewhere]:
        remedy = "Boot with cgroup v2 alone: systemd.unified_cgroup_hierarchy=1 on the kernel's command line."
        return f" This machine has cgroup v1 for {', '.join(held)}.", remedy
    if systemd:
        return "", f"Give {units.WORKERS} Delegate=memory pids cpu; see 'systemctl status {units.WORKERS}'."
    remedy = "Give the container or machine that this runs in a cgroup of its own with them, or limit it as a whole."
    return " There is no systemd here to ask for more.", remedy


def in_v1(mountinfo: str) -> set[str]:
    """Name the controllers that cgroup v1 has, and so keeps from v2 (proc_pid_mountinfo(5), cgroups(7))."""
    lines = (line.partition(" - ")[2].split() for line in mountinfo.splitlines())
    return {option for kind, *_, options in filter(None, lines) if kind == "cgroup" for option in options.split(",")}


async def _is_delegated(worker: Outcome) -> bool:
    """Tell whether systemd leaves the subtree alone; where there is no systemd, nobody else touches it.

    The mark that systemd puts on a delegated cgroup says it; only without one is D-Bus asked, whose library is large.
    """
    if isinstance(worker, Report) and (subtree := accounting.subtree(worker.cgroup)) is not None:
        with contextlib.suppress(OSError):  # an older systemd, or none
            return await asyncio.to_thread(os.getxattr, subtree, "user.delegate") == b"1"
    unit = await units.workers_unit()
    return unit is None or unit.delegated


async def _with_path(name: str, worker: Outcome) -> Result:
    """Tell the exact path, and whether iptables could match it."""
    if isinstance(worker, ProbeFailed):
        return worker.result(name)
    if not worker.cgroup:
        return warning(name, "Workers run outside of any cgroup.", f"Start it: 'systemctl start {units.WORKERS}'.")
    path = str(PurePosixPath(worker.cgroup).parent).lstrip("/")
    fact = f"Delegated: {', '.join(_CONTROLLERS)}. The path for 'iptables -m cgroup --path' is {path}"
    if not await asyncio.to_thread(_has_module):
        remedy = f"Only for rules with -m cgroup: 'modprobe {_MODULE}', and its name in /etc/modules-load.d."
        return info(name, f"{fact}; {_MODULE} is not loaded.", remedy)
    return ok(name, f"{fact}; {_MODULE} is there.")


def _has_module() -> bool:
    """Tell whether the kernel has xt_cgroup loaded, or built in."""
    if Path("/sys/module", _MODULE).exists():
        return True
    built_in = Path("/lib/modules", os.uname().release, "modules.builtin")
    try:
        return f"/{_MODULE}.ko" in built_in.read_text(encoding="utf-8")
    except OSError:
        return False


async def resource_limits(context: Context) -> Result:
    """Look for limits that nothing enforces."""
    name = "resource_limits"
    spawners = {"process": context.spawner, "docker": context.docker}
    used = [spawner for backend, spawner in spawners.items() if context.uses(backend)]
    enforced = set.intersection(*[{*(await spawner.hello()).controllers} for spawner in used])
    configured = [*_limits(context)]
    toothless = [f"{key} ({controller})" for key, controller in configured if controller not in enforced]
    if toothless:
        more = f" and {len(toothless) - 6} more" if len(toothless) > 6 else ""
        remedy = "'cgroup_delegation' says what is missing, and what to do."
        if not context.uses("process"):
            remedy = "Give the engine the controllers; 'docker info' says what is missing."
        elif container.inside():
            remedy = _AS_A_WHOLE
        return warning(name, f"Configured, but not enforced: {', '.join(toothless[:6])}{more}.", remedy)
    return ok(name, f"All {len(configured)} configured limits are enforced.")


def _limits(context: Context) -> Iterable[tuple[str, str]]:
    """Name each limit that is set, and the controller that enforces it."""
    server, process = context.settings.server, context.settings.process
    yield "process.pids_limit", "pids"
    for key, value, controller in (
        ("process.memory_ceiling", process.memory_ceiling, "memory"),
        ("process.cpu_ceiling", process.cpu_ceiling, "cpu"),
        ("server.default_memory_limit", server.default_memory_limit, "memory"),
        ("server.default_cpu_limit", server.default_cpu_limit, "cpu"),
    ):
        if value is not None:
            yield key, controller
    for app in context.apps():
        if app.memory_limit is not None:
            yield f"memory_limit of {app.name}", "memory"
        if app.cpu_limit is not None:
            yield f"cpu_limit of {app.name}", "cpu"
