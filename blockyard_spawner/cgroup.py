"""The workers' subtree of cgroup v2: a directory per worker, its limits, and the one sure way to end it."""

import asyncio
import os
import pathlib
import select
import subprocess

from blockyard_spawner.protocol import Limits, Refused

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

    def __init__(self, root: str) -> None:
        mounts = pathlib.Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
        self.mount = next((line.split()[4] for line in mounts if " - cgroup2 " in line), "")
        self._root = root

    def prepare(self) -> None:
        """Make the subtree ready. Raises FileNotFoundError where it is not there, TimeoutError if that is not known."""
        self.controllers: list[str] = []
        if not self._root:
            asked = subprocess.run(_ASK, stdout=subprocess.PIPE, text=True, check=False)
            if asked.returncode and os.path.isdir("/run/systemd/system"):  # not to know is not to be without
                raise TimeoutError("systemd does not tell where blockyard-workers.service is")
            self._root = asked.stdout.strip() and self.mount + asked.stdout.strip()
        holder, workers = self.directory("", "holder"), self.directory("")
        for directory in (holder, workers):
            directory.mkdir(exist_ok=True)
        for pid in (workers.parent / "cgroup.procs").read_text().split():
            (holder / "cgroup.procs").write_text(pid)  # a cgroup that has processes passes no controller on
        offered = (workers.parent / "cgroup.controllers").read_text().split()
        delegated = [name for name in offered if name in ("cpu", "memory", "pids")]
        for directory in (workers.parent, workers):
            (directory / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in delegated))
        self.controllers = delegated

    def directory(self, name: str, group: str = "workers") -> pathlib.Path:
        """Name a worker's cgroup in the file system; it need not exist."""
        return pathlib.Path(self._root or "/nonexistent", group, name)

    def create(self, name: str, limits: Limits, *, unlimited: bool) -> str:
        """Make a worker's cgroup with its limits; return its directory. Raises Refused.

        Where `unlimited` workers are allowed, what is not there is done without; "" means no cgroup at all.
        """
        try:
            if not self.directory("").exists():  # the unit may have been stopped and started
                self.prepare()
        except FileNotFoundError as error:
            if unlimited:
                return ""
            raise Refused("no_cgroup", "Run 'systemctl start blockyard-workers': their cgroup is not there.") from error
        directory = self.directory(name)
        directory.mkdir()
        cpu = limits.cpu and f"{limits.cpu * 100} 100000"
        asked = {"memory.max": limits.memory, "pids.max": limits.pids, "cpu.max": cpu}
        for knob, value in {**asked, "memory.swap.max": 0, "memory.oom.group": 1}.items():
            if value is not None and (directory / knob).exists():  # without its controller there is none
                (directory / knob).write_text(str(value))
            elif asked.get(knob) and not unlimited:
                raise Refused("limits_unavailable", f"Delegate the controller of {knob}, or set allow_unlimited.")
        return str(directory)

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
