"""The life of every worker, from spawn to the return of its uid.

No state is stored: runtime directories (their owner is the uid), cgroups and /proc are the state, so a restarted
spawner finds its workers there, and what was interrupted is done again.
"""

import asyncio
import contextlib
import errno
import os
import pathlib
import select
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blockyard_spawner import launch, policy, sandbox
from blockyard_spawner.audit import audit
from blockyard_spawner.cgroup import Cgroups, readable
from blockyard_spawner.config import ConfigError
from blockyard_spawner.protocol import Refused, Spawn

_EMPTY_SECONDS, _RETRY_SECONDS, _ENDED_KEPT = 10, 5, 1024
_SWEEP = 'timeout -k1 30 chmod -R u+rwx -- "$1"; timeout -k1 30 find "$1" -mindepth 1 -delete'


@dataclass(slots=True)
class Worker:
    """One worker; `result` is None until it has ended."""

    id: str
    app: str
    uid: int
    cgroup: str = ""  # as in /proc/self/cgroup; "" where there is none
    pid: int = 0
    pidfd: int = -1
    state: str = "starting"  # → "running" → "stopping" → "ended"
    result: dict[str, object] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def record(self, *names: str) -> dict[str, object]:
        """Describe it on the wire."""
        return {name: getattr(self, name) for name in ("id", "uid", "pid", "cgroup", *names)}

    def audit(self, kind: str, result: object, event: str, **peer: object) -> None:
        """Write down what happened to it, and by whose wish."""
        fields = {"worker": self.id, "app": self.app, "uid": self.uid, "cgroup": self.cgroup, **peer}
        audit(kind, f"Worker {self.id} of {self.app} {event}.", result=result, **fields)


class Workers:
    """All workers. Each has a task for its life; the workers themselves go on when those tasks are cancelled."""

    def __init__(self, config: Mapping[str, Any], api_gid: int, *, unprivileged: bool) -> None:
        profile, gid, pool = config["process.seccomp_profile"], config["process.worker_gid"], policy.uids(config)
        self.config, self._gid, self._api_gid, self.unprivileged = config, gid, api_gid, unprivileged
        inside = pathlib.Path(__file__).with_name("sandboxed")
        self._programs = {kind: (inside / name).read_bytes() for kind, name in sandbox.PROGRAMS.items()}
        try:
            self._seccomp = [pathlib.Path(profile).read_bytes()] if profile else []
        except OSError as error:
            remedy = "run `by admin install-seccomp`, or set it to an empty string to go without"
            raise ConfigError(f"'process.seccomp_profile' cannot be read; {remedy}: {error}.") from error
        self.free_uids = deque([os.getuid()] * len(pool) if unprivileged else pool)  # given back longest ago: first
        self.by_id: dict[str, Worker] = {}
        self._cgroups = Cgroups(config["process.cgroup_root"])
        os.makedirs(config["process.runtime_dir"], mode=0o711, exist_ok=True)

    def adopt(self, tasks: asyncio.TaskGroup) -> None:
        """Take over what an earlier spawner left: the living are watched, the dead are cleared away.

        From now on `tasks` holds the workers' lives.
        """
        self._tasks = tasks
        with contextlib.suppress(FileNotFoundError):  # each spawn will try again
            self._cgroups.prepare()
        for name in os.listdir(self._directory("")):
            found = os.lstat(self._directory(name))
            if found.st_uid == 0:
                with contextlib.suppress(OSError):  # made, but not yet given away: empty
                    os.rmdir(self._directory(name))
            # Others' are none of ours, whatever a careless setting says: workers' uids begin at 1000.
            if found.st_uid not in self.free_uids and (found.st_uid < 1000 or found.st_gid != self._api_gid):
                continue
            with contextlib.suppress(ValueError):  # the pool was another when it began
                self.free_uids.remove(found.st_uid)
            worker = self.by_id[name] = Worker(name, "", found.st_uid, state="running")
            with contextlib.suppress(StopIteration, IndexError, OSError):  # it ended meanwhile, or never came to exec
                worker.pid = next(pid for pid in self._cgroups.pids(name) if len(_pids_within(pid)) == 1)
                worker.pidfd = os.pidfd_open(worker.pid)
                worker.cgroup = str(self._cgroups.directory(name)).removeprefix(self._cgroups.mount)
                # These are bwrap's own words: it is outside of its sandbox, so that no app can change them.
                worker.app = _about(worker.pid, "cmdline").split("BLOCKYARD_APP\0")[1].split("\0")[0]
            self._tasks.create_task(self._live(worker))

    def about(self) -> dict[str, object]:
        """Describe the host on the wire."""
        uids = {"uids_free": len(self.free_uids), "uids_total": len(policy.uids(self.config))}
        return {"controllers": self._cgroups.controllers, "unprivileged": self.unprivileged, **uids}

    def status(self) -> str:
        """Describe the present in a line."""
        return f"{sum(not worker.result for worker in self.by_id.values())} workers, {len(self.free_uids)} uids free"

    async def spawn(self, request: Spawn, log: int, peer: Mapping[str, object]) -> Worker:
        """Start one; when this returns, bwrap runs. Raises Refused."""
        name, wanted = request.id, policy.authorize(self.config, request)
        if name in self.by_id:
            raise Refused("worker_exists", f"Use a new id: worker {name} exists.")
        worker = self.by_id[name] = Worker(name, request.app, self._take_uid())
        given = [log, log]
        try:
            given.extend(launch.open_source(source) for source in wanted.sources)  # what is open is in the list
            made = sandbox.files(self.config, worker.uid, request.kind, self._programs[request.kind])
            given.extend(launch.open_contents(data) for data in (*made.values(), *self._seccomp))
            os.mkdir(self._directory(name), 0o700)
            os.chmod(self._directory(name), 0o2710)  # noqa: S103 - before it is given away: later needs a capability
            os.chown(self._directory(name), worker.uid, self._api_gid)
            cgroup = self._cgroups.create(name, wanted.limits, unlimited=self.config["process.allow_unlimited"])
            worker.cgroup = cgroup.removeprefix(self._cgroups.mount)
            argv = sandbox.bwrap_argv(self.config, wanted, made, lasting=bool(cgroup))
            worker.pid, worker.pidfd = launch.start(worker.uid, self._gid, argv, wanted.env, given, cgroup)
            worker.state = "running"
            worker.audit("spawn", "ok", "was started", **peer)
        finally:
            for descriptor in given[2:]:
                os.close(descriptor)
            self._tasks.create_task(self._live(worker))  # which also clears away what failed half-way
        return worker

    async def stop(self, worker: Worker, grace: float, peer: Mapping[str, object]) -> None:
        """Interrupt the app, after `grace` seconds kill what is left; return when everything is gone."""
        # Else it ended by itself, and is told so.
        if worker.state == "running" and worker.pidfd >= 0 and not _has_ended(worker.pidfd):
            worker.state = "stopping"
            worker.audit("stop", "ok", "is being stopped", **peer)
            self._tasks.create_task(self._interrupt(worker, grace))
        await worker.ended.wait()

    async def _interrupt(self, worker: Worker, grace: float) -> None:
        with contextlib.suppress(OSError, Refused):  # a TimeoutError is an OSError, and so is that no cgroup is left
            apps = [pid for pid in self._cgroups.pids(worker.id) if _pids_within(pid)[-1:] == [2]]
            await self._run_as(worker, "kill -INT $*", *map(str, apps))  # R: process 1 in the sandbox is bwrap's
            await asyncio.wait_for(worker.ended.wait(), grace)
        with contextlib.suppress(OSError, Refused):
            if worker.cgroup:
                self._cgroups.kill(worker.id)
            elif worker.pidfd >= 0:  # bwrap's end takes its pid namespace along
                await self._run_as(worker, "kill -KILL $1", str(worker.pid))

    async def _live(self, worker: Worker) -> None:
        status, number = await _exit_of(worker.pidfd)
        worker.pidfd = -1
        kills = await self._clear(worker)
        if self.unprivileged or worker.uid in policy.uids(self.config):
            self.free_uids.append(worker.uid)
        if worker.state == "starting":  # it never ran, and its refusal is in the audit
            del self.by_id[worker.id]
            return
        worker.result = outcome(status, number, kills, stopped=worker.state == "stopping")
        worker.state = "ended"
        worker.ended.set()
        worker.audit("exit", worker.result["reason"], f"ended: {worker.result}")
        for name in [other.id for other in self.by_id.values() if other.result][:-_ENDED_KEPT]:
            del self.by_id[name]

    async def _clear(self, worker: Worker) -> int:
        """Remove everything of a worker, however long it takes; meanwhile its uid rests. Return the OOM kills."""
        kills = 0
        while True:
            try:
                with contextlib.suppress(FileNotFoundError):  # it has no cgroup, or no more
                    kills = await asyncio.wait_for(self._cgroups.end(worker.id), _EMPTY_SECONDS)
                if worker.id in os.listdir(self._directory("")):
                    # As the worker, and bounded: root has no right to look into the directory.
                    await self._run_as(worker, _SWEEP, self._directory(worker.id))
                    os.rmdir(self._directory(worker.id))
            except (OSError, Refused) as error:  # a TimeoutError is an OSError
                if getattr(error, "errno", None) != errno.ENODEV:  # systemd removed its cgroup as it was looked at
                    worker.audit("exit", "quarantined", f"cannot be cleared away yet, so its uid rests: {error!r}")
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                return kills

    async def _run_as(self, worker: Worker, script: str, *arguments: str) -> None:
        """Run a shell's command line as the worker's uid: root itself has no right to signal or to look."""
        argv = ["/bin/sh", "-c", f"exec 2>/dev/null; {script}", "sh", *arguments]
        _, pidfd = launch.start(worker.uid, self._gid, argv, {}, [2, 2], "")
        await _exit_of(pidfd)

    def _take_uid(self) -> int:
        for _ in range(len(self.free_uids)):
            if self.unprivileged or not _is_used(self.free_uids[0]):
                return self.free_uids.popleft()
            self.free_uids.rotate(-1)
        raise Refused("uid_pool_exhausted", "Stop a worker, or widen process.worker_uid_range: no uid is free.")

    def _directory(self, name: str) -> str:
        return f"{self.config['process.runtime_dir']}/{name}"


def _has_ended(pidfd: int) -> bool:
    waiting = select.poll()  # not select(), which knows no descriptor above 1023
    waiting.register(pidfd, select.POLLIN)
    return bool(waiting.poll(0))


async def _exit_of(pidfd: int) -> tuple[int | None, int | None]:
    """Wait for a process's end, close its pidfd, and return its status or its signal; neither if it cannot be known."""
    if pidfd < 0:
        return None, None
    try:
        await readable(pidfd)
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)  # noqa: ASYNC222 - it has ended
    except ChildProcessError:  # adopted: not this process's child
        return None, None
    finally:
        os.close(pidfd)
    number = ended.si_status if ended else None
    return (number, None) if ended and ended.si_code == os.CLD_EXITED else (None, number)


def outcome(status: int | None, number: int | None, kills: int, *, stopped: bool) -> dict[str, object]:
    """Word how a worker ended: its exit status or the signal's number, and how often memory ran out."""
    if status is not None and 128 < status <= 128 + 64:  # bwrap and Docker report the app's signal as a shell does
        number = status - 128
    reasons = {"oom": kills, "stopped": stopped, "signalled": number, "exited": status is not None, "unknown": True}
    reason = next(name for name, holds in reasons.items() if holds)
    return {"reason": reason, "status": status, "signal": number, "oom_kills": kills}


def _is_used(uid: int) -> bool:
    """Tell whether a process of a uid lives. What is dead is harmless, and may wait for its parent for long."""
    try:
        os.getpriority(os.PRIO_USER, uid)  # the kernel's word, as a rule: none at all
    except ProcessLookupError:
        return False
    all_of_them = [_about(int(pid), "status") for pid in os.listdir("/proc") if pid.isdigit()]
    return any(f"\nUid:\t{uid}\t" in text and "\nState:\tZ" not in text for text in all_of_them)


def _pids_within(pid: int) -> list[int]:
    """List a process's pids, from ours to the innermost namespace's; none if it is gone."""
    _, _, numbers = _about(pid, "status").partition("\nNSpid:")
    return [int(number) for number in numbers.partition("\n")[0].split()]


def _about(pid: int, name: str) -> str:
    """Read a file of /proc; nothing if the process is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return pathlib.Path(f"/proc/{pid}/{name}").read_text("utf-8", "replace")
    return ""
