"""What a worker uses and which of its limits it runs into, read from its cgroup."""

import asyncio
import contextlib
import os
import select
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Usage:
    """A worker's use at one moment; None where the controller is not there."""

    cpu_usec: int | None = None  # since its start
    memory: int | None = None  # bytes
    memory_limit: int | None = None  # bytes
    throttled_usec: int | None = None  # for how long its threads were held back, since its start
    kernel_memory: int | None = None  # bytes of the kernel's own that its files and the like take


@dataclass(frozen=True, slots=True)
class Hits:
    """How often a worker has run into limits so far."""

    forks_refused: int = 0
    process_limit: int | None = None
    memory_exhausted: int = 0  # allocations that its own limit stood against
    memory_kills: int = 0  # processes of it that were killed for memory, whoever's limit it was


def cgroup2_mount() -> Path | None:
    """Return where cgroup2 is mounted, whatever its place (proc_pid_mountinfo(5))."""
    for line in _MOUNTINFO.read_text(encoding="utf-8").splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.startswith("cgroup2 "):
            return Path(fields.split()[4])
    return None


def subtree(cgroup: str) -> Path | None:
    """Return the directory of the unit that a worker's cgroup lies in; None where it has none, or there is no mount."""
    mount = cgroup2_mount()
    return mount / PurePosixPath(cgroup).parents[1].relative_to("/") if mount is not None and cgroup else None


def usage(directory: Path | None) -> Usage:
    """Read a worker's counters; blocking, but from memory. Without a cgroup nothing is known."""
    if directory is None:
        return Usage()
    cpu, memory = _counters(directory / "cpu.stat"), _counters(directory / "memory.stat")
    return Usage(
        cpu.get("usage_usec"),
        _number(directory / "memory.current"),
        _number(directory / "memory.max"),
        cpu.get("throttled_usec"),
        memory.get("slab"),
    )


def hits(directory: Path) -> Hits:
    """Read how often a worker ran into limits; zero where a controller is not there."""
    processes, memory = _counters(directory / "pids.events"), _counters(directory / "memory.events")
    return Hits(
        processes.get("max", 0),
        _number(directory / "pids.max"),
        memory.get("oom", 0),
        memory.get("oom_kill", 0),
    )


@contextlib.contextmanager
def told_of_hits(directory: Path | None, tell: Callable[[Hits], None]) -> Iterator[None]:
    """Call `tell` whenever the kernel says that a worker ran into its limit of processes or of memory.

    Polling would miss the last one: the cgroup is removed as soon as the worker has ended.
    """
    changes = None
    if directory is not None:
        with contextlib.suppress(OSError):  # no descriptor is left
            changes = select.epoll()
    if directory is None or changes is None:
        yield
        return
    loop = asyncio.get_running_loop()
    with changes, contextlib.ExitStack() as opened:
        events: list[int] = []
        for name in ("pids.events", "memory.events"):
            with contextlib.suppress(OSError):  # the worker has ended, or the controller is not delegated
                events.append(os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC))
                opened.callback(os.close, events[-1])
                changes.register(events[-1], select.EPOLLPRI)

        def changed() -> None:
            for descriptor in list(events):
                try:
                    os.pread(descriptor, 4096, 0)  # else the next change would not be told
                except OSError:  # the cgroup is gone, and the kernel would never tire of saying so
                    changes.unregister(descriptor)
                    events.remove(descriptor)
            tell(hits(directory))

        loop.add_reader(changes.fileno(), changed)
        try:
            changed()
            yield
        finally:
            loop.remove_reader(changes.fileno())


def files_left(directory: str) -> float:
    """Return the share of a file system's files that may still be made, from 0.0 to 1.0; blocking."""
    try:
        state = os.statvfs(directory)
    except FileNotFoundError:  # made by the spawner, when it first runs
        return 1.0
    return state.f_favail / state.f_files if state.f_files else 1.0  # no bound


def _counters(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(path).splitlines())
    return {name: int(value) for name, value in pairs}


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None  # "max" is none


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:  # the worker ended, or the controller is not delegated
        return ""
