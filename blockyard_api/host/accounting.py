"""What a worker uses, read from its cgroup."""

from dataclasses import dataclass
from pathlib import Path

_MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Usage:
    """A worker's use at one moment; None where the controller is not there."""

    cpu_usec: int | None  # since its start
    memory: int | None  # bytes
    memory_limit: int | None  # bytes


def cgroup2_mount() -> Path | None:
    """Return where cgroup2 is mounted, whatever its place (proc_pid_mountinfo(5))."""
    for line in _MOUNTINFO.read_text(encoding="utf-8").splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.startswith("cgroup2 "):
            return Path(fields.split()[4])
    return None


def usage(mount: Path, cgroup: str) -> Usage:
    """Read a worker's counters; blocking, but from memory."""
    directory = mount / cgroup.lstrip("/")
    stat = dict(line.split() for line in _text(directory / "cpu.stat").splitlines())
    limit = _text(directory / "memory.max").strip()
    memory = _text(directory / "memory.current").strip()
    return Usage(
        int(stat["usage_usec"]) if "usage_usec" in stat else None,
        int(memory) if memory else None,
        int(limit) if limit.isdigit() else None,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:  # the worker ended, or the controller is not delegated
        return ""
