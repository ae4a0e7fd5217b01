"""The life of every Docker worker, from spawn to the return of its subnet.

The engine's containers and networks, told apart by their labels, are the state: a restarted helper finds its workers
there, and what was interrupted is done again.
"""

import asyncio
import contextlib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from typing import Any

from blockyard_spawner import launch, policy
from blockyard_spawner.audit import audit
from blockyard_spawner.cgroup import readable
from blockyard_spawner.config import ConfigError
from blockyard_spawner.docker import container
from blockyard_spawner.docker.engine import Engine, EngineRefused
from blockyard_spawner.docker.forward import Position, forward
from blockyard_spawner.docker.keeping import Keeper
from blockyard_spawner.docker.networks import Networks
from blockyard_spawner.protocol import Refused, Spawn
from blockyard_spawner.workers import Worker, outcome

_SPAWN_WITHIN = 12.0  # seconds: less than the API waits for a reply
_AT_ONCE = 8  # starts that the engine is asked for at the same time
_DRAIN_WITHIN = 5.0  # seconds that the API has to read what an ended worker wrote
_RETRY, _RETRY_AT_MOST = 1.0, 5.0  # seconds
_LOOKS, _LOOK_AFTER = 20, 0.1  # how often, and after how many seconds, a process that has gone is looked for
_SWEPT_WITHIN = 65.0  # seconds: longer than a sweep takes, or the next one would begin where it began
_STEP = 256  # files of a worker's that are removed in one turn of the loop: it may have made a million
_LOOK_AGAIN = (1.0, 4.0, 15.0, 60.0)  # seconds
_DOUBTFUL = ("docker_slow", "docker_unreachable")
_ENDED_KEPT = 1024
_CONTROLLERS = {"memory": "MemoryLimit", "cpu": "CpuCfsQuota", "pids": "PidsLimit"}  # → what the engine calls it


class Containers:
    """All workers. Each has a task for its life; the containers themselves go on when those tasks are cancelled."""

    def __init__(self, config: Mapping[str, Any], api_gid: int, engine: Engine, keeper: Keeper) -> None:
        self.config, self._engine, self._keeper = config, engine, keeper
        self.networks = Networks(config, engine)
        self._known: dict[str, Worker] = {}
        self._containers: dict[str, str] = {}  # worker → container
        self._networks: dict[str, str] = {}  # worker → network
        self._oom: set[str] = set()
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._controllers: list[str] = []
        self._log_driver = "json-file"
        self._away: Refused | None = Refused(
            "docker_unreachable", "Wait a moment: the container engine is being asked."
        )
        _check_directory(config["docker.runtime_dir"], api_gid)

    @property
    def by_id(self) -> dict[str, Worker]:
        """All workers. Raises Refused while those of an earlier run are not known: "none" would be a lie."""
        if self._away:
            raise self._away
        return self._known

    def about(self) -> dict[str, object]:
        """Describe the host on the wire."""
        places = {"uids_free": len(self.networks.free), "uids_total": self.networks.total}
        return {"controllers": self._controllers, "unprivileged": False, **places}

    def status(self) -> str:
        """Describe the present in a line."""
        running = sum(worker.result is None for worker in self._known.values())
        return self._away.message if self._away else f"{running} workers, {len(self.networks.free)} subnets free"

    # --- start of the helper -------------------------------------------------------------------------------------

    async def adopt(self, tasks: asyncio.TaskGroup, pipes: dict[str, int]) -> None:
        """Take over what an earlier helper left, as soon as the engine answers.

        The living are watched, the rest removed. From now on `tasks` holds the workers' lives.
        Raises ConfigError for a runtime that the engine does not have.
        """
        self._tasks = tasks
        try:
            await self._adopt(pipes)
        except Refused as error:
            self._away = error
            audit("refusal", error.message, result=error.code)
            tasks.create_task(self._adopt_later(pipes))

    async def _adopt_later(self, pipes: dict[str, int]) -> None:
        while self._away:
            await asyncio.sleep(_RETRY)
            try:
                await self._adopt(pipes)
            except Refused as error:
                self._away = error
            except ConfigError as error:
                self._away = Refused("docker_runtime", str(error))

    async def _adopt(self, pipes: dict[str, int]) -> None:
        info = await self._engine.info()
        check_runtimes(self.config, info)
        self._controllers = [name for name, key in _CONTROLLERS.items() if info.get(key)]
        self._log_driver = "local" if "local" in info.get("Plugins", {}).get("Log", ()) else "json-file"
        ours = f"{container.LABEL}/installation={self.config['storage.state_dir']}"
        networks = await self._engine.networks()
        self.networks.adopt(networks)
        label = f"{container.LABEL}/worker"
        installation = f"{container.LABEL}/installation"
        for network in networks:
            marks = network.get("Labels") or {}
            if marks.get(installation) == self.config["storage.state_dir"] and label in marks:
                self._networks[marks[label]] = network["Id"]
        for found in await self._engine.containers(ours):
            worker = Worker(found["Labels"].get(label, ""), found["Labels"].get(f"{container.LABEL}/app", ""), 0)
            if worker.id in self._known:  # of an earlier attempt, after which the engine was away
                continue
            sweeps = self._containers.get(worker.id, found["Id"]) != found["Id"]
            if not re.fullmatch("[a-z0-9]{8,32}", worker.id) or not worker.app or sweeps:
                await self._engine.remove(found["Id"])  # emptied a directory when it was interrupted
                continue
            self._containers[worker.id] = found["Id"]
            if await self._meet(worker):
                self._known[worker.id] = worker
                worker.state = "running"
                self._tasks.create_task(self._live(worker, pipes.pop(worker.id, -1)))
        for name, pipe in pipes.items():
            os.close(pipe)
            self._keeper.drop(name)
        pipes.clear()
        self._away = None
        for name in {*self._networks, *self._containers, *self._directories()} - self._known.keys():
            self._tasks.create_task(self._clear(Worker(name, "", 0)))
        self._tasks.create_task(self._end_what_runs_out_of_memory(ours))

    def _directories(self) -> set[str]:
        return {name.removesuffix(".position") for name in os.listdir(self.config["docker.runtime_dir"])}

    # --- a worker's life -----------------------------------------------------------------------------------------

    async def spawn(self, request: Spawn, log: int, peer: Mapping[str, object]) -> Worker:
        """Start one; when this returns, its container runs. Raises Refused.

        Goes on when it is cancelled: whoever asked has gone, and a later one will list the worker.
        """
        if request.network == "host":
            message = "Set the app's network to 'default' or 'none': a Docker worker has a network of its own."
            raise Refused("network_not_available", message)
        wanted = policy.authorize(self.config, request)
        if request.id in self.by_id:
            raise Refused("worker_exists", f"Use a new id: worker {request.id} exists.")
        self._check_limits(wanted)
        worker = self._known[request.id] = Worker(request.id, request.app, container.USER)
        error = await asyncio.shield(self._tasks.create_task(self._begin(worker, wanted, os.dup(log), peer)))
        if error:
            raise error
        return worker

    def _check_limits(self, wanted: policy.Launch) -> None:
        for name in _CONTROLLERS:
            enforced = name in self._controllers or self.config["process.allow_unlimited"]
            if getattr(wanted.limits, name) and not enforced:
                message = f"Give the engine the controller {name}, or set process.allow_unlimited."
                raise Refused("limits_unavailable", message)

    async def _begin(
        self, worker: Worker, wanted: policy.Launch, log: int, peer: Mapping[str, object]
    ) -> Refused | OSError | None:
        try:
            async with asyncio.timeout(_SPAWN_WITHIN), self._room:
                await self._make(worker, wanted)
        except (Refused, OSError) as error:  # a TimeoutError is an OSError
            os.close(log)
            if isinstance(error, TimeoutError):
                error = Refused("docker_slow", f"See to the container engine: no start within {_SPAWN_WITHIN:.0f} s.")
            self._tasks.create_task(self._forget(worker, doubtful=_is_doubtful(error)))
            return error
        worker.state = "running"
        self._keeper.keep(worker.id, log)
        worker.audit("spawn", "ok", "was started", **peer)
        self._tasks.create_task(self._live(worker, log))
        return None

    async def _make(self, worker: Worker, wanted: policy.Launch) -> None:
        with contextlib.ExitStack() as opened:
            marks = []
            for source in wanted.sources:
                descriptor = launch.open_source(source)
                opened.callback(os.close, descriptor)  # held until the start: the inode becomes nobody else's
                marks.append(f"{os.fstat(descriptor).st_dev}:{os.fstat(descriptor).st_ino}")
            self._make_directory(worker.id)
            isolated = wanted.request.network == "none"
            network = "none" if isolated else container.network_name(worker.id)
            description = container.described(self.config, wanted, network, marks, self._log_driver)
            await (self._create if isolated else self._create_in_network)(worker, description)
            await self._engine.start(self._containers[worker.id])
            if not await self._meet(worker):
                raise Refused("exec_failed", "See the engine's log: the container was not started.")

    async def _create(self, worker: Worker, description: Mapping[str, Any]) -> None:
        self._containers[worker.id] = await self._engine.create(f"blockyard-{worker.id}", description)

    async def _create_in_network(self, worker: Worker, description: Mapping[str, Any]) -> None:
        """Make a container and its network at the same time, which takes a third less than one after the other.

        Docker looks for the network only when the container starts. Podman refuses until it is there.
        """
        self.networks.check_room()

        async def make_network() -> None:
            self._networks[worker.id] = await self.networks.make(worker.id, worker.app)

        both = make_network(), self._create(worker, description)
        results = await asyncio.gather(*both, return_exceptions=True)  # nothing is still being made when this raises
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            failure = next(filter(_is_doubtful, failures), failures[0])
            if worker.id not in self._networks or not isinstance(failure, Refused) or _is_doubtful(failure):
                raise failure
            await self._create(worker, description)
        await self.networks.connect_sidecars(self._networks[worker.id])

    def _make_directory(self, name: str) -> None:
        # Its group and set-group-id bit are inherited: no right is needed to give it to the API's. Others are the
        # container's user, in which it is mounted; on the host they do not come through the directory above.
        mask = os.umask(0)
        try:
            os.mkdir(self._directory(name), 0o717)
        except FileExistsError as error:
            raise Refused("worker_exists", f"Use a new id: something of worker {name} is still there.") from error
        finally:
            os.umask(mask)

    async def _meet(self, worker: Worker) -> bool:
        """Take hold of a started container's first process; False for one that was never started.

        One that has ended already has no process: its descriptor is readable from the start, as an ended one's is. So
        is that of one whose process has gone where the engine does not come to notice.
        """
        identity, pid = self._containers[worker.id], 0
        for _ in range(_LOOKS):
            state = (await self._engine.show(identity))["State"]
            if state["Status"] == "created":
                return False
            if not state["Running"]:
                break
            if state["Pid"] == pid and worker.pidfd >= 0:  # it ran before and after: the descriptor is of no other
                worker.pid, worker.uid, worker.cgroup = pid, _uid(pid), _cgroup(pid)
                return True
            _close(worker.pidfd)
            worker.pidfd, pid = -1, state["Pid"]
            try:
                worker.pidfd = os.pidfd_open(pid)
            except OSError:  # there is no such process, or 0 is none
                await asyncio.sleep(_LOOK_AFTER)
        _close(worker.pidfd)
        worker.pid, worker.pidfd = 0, os.eventfd(1, os.EFD_CLOEXEC)
        return True

    async def stop(self, worker: Worker, grace: float, peer: Mapping[str, object]) -> None:
        """Interrupt the app, after `grace` seconds kill what is left; return when everything is gone."""
        if worker.state == "running":
            worker.state = "stopping"
            worker.audit("stop", "ok", "is being stopped", **peer)
            self._tasks.create_task(self._interrupt(worker, grace))
        await worker.ended.wait()

    async def _interrupt(self, worker: Worker, grace: float) -> None:
        with contextlib.suppress(Refused, TimeoutError):
            if grace and worker.id in self._containers:  # else it has ended, and is being cleared away
                await self._engine.kill(self._containers[worker.id], "SIGINT")
            await asyncio.wait_for(worker.ended.wait(), grace)
        await self._kill(worker)

    async def _kill(self, worker: Worker) -> None:
        while worker.result is None and worker.id in self._containers:
            try:
                await self._engine.kill(self._containers[worker.id], "SIGKILL")
            except EngineRefused:  # it does not run any more
                return
            except Refused:
                await asyncio.sleep(_RETRY)
            else:
                return

    async def _live(self, worker: Worker, log: int) -> None:
        over = asyncio.Event()
        position = Position(f"{self._directory(worker.id)}.position")
        moving = None
        if log >= 0:
            moving = self._tasks.create_task(
                forward(self._engine, self._containers[worker.id], log, position, over.is_set)
            )
            moving.add_done_callback(lambda _: os.close(log))
        await readable(worker.pidfd)
        state = await self._last_state(worker)
        over.set()
        if moving:
            await asyncio.wait([moving], timeout=_DRAIN_WITHIN)
            moving.cancel()
        self._keeper.drop(worker.id)
        kills = int(worker.id in self._oom or bool(state.get("OOMKilled")))
        result = outcome(state.get("ExitCode"), None, kills, stopped=worker.state == "stopping")
        if result["status"] == container.SWAPPED:
            # The app itself can end like this, too: what it does cannot be told from what ran before it.
            told = "ended as one does that was given a mount that is not what was checked"
            worker.audit("refusal", "source_swapped", told)
        await self._clear(worker)
        _close(worker.pidfd)
        worker.pidfd, worker.result, worker.state = -1, result, "ended"
        self._oom.discard(worker.id)
        worker.ended.set()
        worker.audit("exit", result["reason"], f"ended: {result}")
        for name in [other.id for other in self._known.values() if other.result][:-_ENDED_KEPT]:
            del self._known[name]

    async def _last_state(self, worker: Worker) -> Mapping[str, Any]:
        """Return how a container ended, as soon as the engine tells; nothing if somebody removed it."""
        while True:
            try:
                await self._engine.wait(self._containers[worker.id])
                state: Mapping[str, Any] = (await self._engine.show(self._containers[worker.id]))["State"]
            except EngineRefused as error:
                if error.status == 404:
                    return {}
            except Refused:
                pass
            else:
                if not state["Running"]:
                    return state
            await asyncio.sleep(_RETRY)

    async def _forget(self, worker: Worker, *, doubtful: bool) -> None:
        """Clear away what failed half-way; its refusal is in the audit.

        Where it is in doubt what the engine did, it may still do it: so it is looked again for a while.
        """
        await self._clear(worker)
        for pause in _LOOK_AGAIN if doubtful else ():
            await asyncio.sleep(pause)
            with contextlib.suppress(Refused):
                await self._clear_late(worker.id)
        _close(worker.pidfd)
        del self._known[worker.id]

    async def _clear(self, worker: Worker) -> None:
        """Remove everything of a worker, however long it takes; meanwhile its id and subnet rest."""
        told, pause = "", _RETRY
        while True:
            try:
                if worker.id in self._containers:
                    await self._engine.remove(self._containers[worker.id])
                    del self._containers[worker.id]
                if worker.id in self._networks:
                    await self.networks.remove(self._networks[worker.id])
                    del self._networks[worker.id]
                await self._remove_directory(worker.id)
            except (OSError, Refused) as error:
                if repr(error) != told:  # an engine that is away for a night fills no journal
                    worker.audit("exit", "quarantined", f"cannot be cleared away yet: {error!r}")
                told = repr(error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _RETRY_AT_MOST)
            else:
                return

    async def _clear_late(self, name: str) -> None:
        """Remove what the engine made after nobody waited for it any more."""
        marks = container.labels(self.config, name, "")
        for found in await self._engine.containers(*(f"{key}={value}" for key, value in marks.items() if value)):
            await self._engine.remove(found["Id"])
        for network in await self._engine.networks():
            theirs = network.get("Labels") or {}
            if all(theirs.get(key) == value for key, value in marks.items() if value):
                await self._engine.remove_network(network["Id"])

    async def _remove_directory(self, name: str) -> None:
        directory = self._directory(name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{directory}.position")
        try:
            entries = os.scandir(directory)
        except FileNotFoundError:
            return
        with entries:
            stubborn = not await _removed_all(entries)
        if stubborn:
            await self._engine.remove(f"blockyard-sweep-{name}")  # of an attempt whose end the engine did not tell
            sweeper = await self._engine.create(f"blockyard-sweep-{name}", container.sweeping(self.config, name))
            try:
                await self._engine.start(sweeper)
                await self._engine.wait(sweeper, _SWEPT_WITHIN)
            finally:
                await self._engine.remove(sweeper)
        os.rmdir(directory)

    async def _end_what_runs_out_of_memory(self, label: str) -> None:
        """End a worker as a whole when the kernel kills one of its processes for want of memory.

        Half an app, whose other half is gone, would go on in an unknown state.
        """
        while True:
            with contextlib.suppress(Refused):
                async for identity in self._engine.events("oom", label):
                    for name in [name for name, known in self._containers.items() if known == identity]:
                        self._oom.add(name)
                        await self._kill(self._known[name])
            await asyncio.sleep(_RETRY)

    def _directory(self, name: str) -> str:
        return f"{self.config['docker.runtime_dir']}/{name}"


def check_runtimes(config: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Raise ConfigError for a configured runtime that the engine does not have, and name those it has."""
    has = sorted(info.get("Runtimes") or {})
    wanted = {"docker.runtime": config["docker.runtime"]}
    wanted |= {f"docker.runtime_defaults.{access}": name for access, name in config["docker.runtime_defaults"].items()}
    for key, name in wanted.items():
        if name and name not in has:
            raise ConfigError(f"'{key}' is {name}, which the engine does not have; it has {', '.join(has)}.")


def _check_directory(path: str, gid: int) -> None:
    """Raise ConfigError unless the runtime directory hands its group down and lets nobody else through."""
    found = os.stat(path)
    sound = found.st_uid == os.geteuid() and found.st_gid == gid and stat.S_IMODE(found.st_mode) == 0o2710
    if not sound:
        raise ConfigError(f"Make {path} with mode 2710, owned by this helper's user and the API's group: it is not so.")


def _uid(pid: int) -> int:
    """Tell which uid a process has on the host: another than inside, where the engine maps its users."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
        return int(status.read().partition("\nUid:\t")[2].split()[0])
    return container.USER


def _cgroup(pid: int) -> str:
    """Name a process's cgroup of version 2; "" where there is none."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cgroup", encoding="utf-8") as lines:
        found = next((line.strip()[3:] for line in lines if line.startswith("0::")), "")
        return "" if found == "/" else found  # the root: limits are in cgroups of version 1
    return ""


def _is_doubtful(failure: BaseException) -> bool:
    """Tell whether the engine may have done, or may still do, what was asked of it."""
    return isinstance(failure, Refused) and failure.code in _DOUBTFUL


async def _removed_all(entries: Iterable[os.DirEntry[str]]) -> bool:
    """Remove files and empty directories; False as soon as one cannot be."""
    for number, entry in enumerate(entries, 1):
        if not _removed(entry):
            return False
        if number % _STEP == 0:
            await asyncio.sleep(0)
    return True


def _removed(entry: os.DirEntry[str]) -> bool:
    """Remove a file or an empty directory; False for a directory of the worker's with something in it."""
    try:
        (os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink)(entry.path)
    except OSError:
        return False
    return True


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)
