"""The workers' subtree of cgroup v2: a directory per worker, its limits, and the one sure way to end it."""

import asyncio
import os
import pathlib
import select
import subprocess

from blockyard_spawner.protocol import Limits, Refused

_WANTED = ("memory", "pids", "cpu")
_ASK = ("timeout", "5", "systemctl", "show", "--property=ControlGroup", "--value", "blockyard-workers.service")


async def readable(descriptor: int) -> None:
    """Wait until a descriptor is readable: a packet, a process's end, a change."""
    ready = asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        asyncio.get_running_loop().remove_reader(descriptor)


class Cgroups:
    """The subtree at `root`; an empty `root` asks systemd where the workers' unit is."""

    def __init__(self, root: str, *, allow_unlimited: bool) -> None:
        mounts = pathlib.Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
        self._mount = next((line.split()[4] for line in mounts if " - cgroup2 " in line), "")
        self._root = root
        self._allow_unlimited = allow_unlimited
        self.controllers: list[str] = []

    def prepare(self) -> bool:
        """Make the subtree ready, at each spawn: its unit may have been stopped and started. False: there is none."""
        if not self._root and os.path.isdir("/run/systemd/system"):
            answer = subprocess.run(_ASK, stdout=subprocess.PIPE, text=True, check=False).stdout.strip()
            self._root = answer and self._mount + answer
        if not self._mount or not os.path.isdir(self._root):
            return False
        holder, workers = self.directory("", "holder"), self.directory("")
        for directory in (holder, workers):
            directory.mkdir(exist_ok=True)
        for pid in (workers.parent / "cgroup.procs").read_text().split():
            (holder / "cgroup.procs").write_text(pid)  # a cgroup that has processes passes no controller on
        for directory in (workers.parent, workers):
            offered = (directory / "cgroup.controllers").read_text().split()
            self.controllers = [name for name in _WANTED if name in offered]
            (directory / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in self.controllers))
        return True

    def directory(self, name: str, group: str = "workers") -> pathlib.Path:
        """Name a worker's cgroup in the file system; it need not exist."""
        return pathlib.Path(self._root, group, name)

    def create(self, name: str, limits: Limits) -> str:
        """Make a worker's cgroup with its limits; return its path as in /proc, or "" where root allows to do without.

        Raises Refused ``no_cgroup`` and ``limits_unavailable``.
        """
        found, directory = self.prepare(), self.directory(name)
        missing = [limit for limit in _WANTED if getattr(limits, limit) and limit not in self.controllers]
        if not self._allow_unlimited and not found:
            raise Refused("no_cgroup", "Run 'systemctl start blockyard-workers': the workers' cgroup is not there.")
        if not self._allow_unlimited and missing:
            raise Refused("limits_unavailable", f"Delegate cgroup controller {missing[0]}, or set allow_unlimited.")
        if not found:
            return ""
        directory.mkdir()
        cpu = f"{limits.cpu * 100} 100000" if limits.cpu else None
        memory = {"memory.max": limits.memory, "memory.swap.max": 0, "memory.oom.group": 1}
        for knob, value in {"pids.max": limits.pids, "cpu.max": cpu, **memory}.items():
            if value is not None and (directory / knob).exists():  # without its controller there is none
                (directory / knob).write_text(str(value))
        return str(directory).removeprefix(self._mount)

    def pids(self, name: str) -> list[int]:
        """List a worker's processes."""
        return [int(pid) for pid in (self.directory(name) / "cgroup.procs").read_text().split()]

    def kill(self, name: str) -> None:
        """Kill every process of a worker, however it forked."""
        (self.directory(name) / "cgroup.kill").write_text("1")

    async def end(self, name: str) -> int:
        """Kill a worker, wait until nothing of it is left, remove its cgroup; return the out-of-memory kills in it."""
        self.kill(name)
        with select.epoll() as changes, (self.directory(name) / "cgroup.events").open("rb", buffering=0) as events:
            changes.register(events, select.EPOLLPRI)  # a change since the last read
            while b"populated 1" in os.pread(events.fileno(), 4096, 0):
                await readable(changes.fileno())
        memory = self.directory(name) / "memory.events"
        counts = memory.read_text().split() if memory.exists() else ["oom_kill", "0"]
        self.directory(name).rmdir()
        return int(counts[counts.index("oom_kill") + 1])
