"""One worker's course: has it started, waits until it serves, keeps its log, has it stopped, and words its end."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blockyard_api.apps.catalog import App
from blockyard_api.backends.spawner import Result, Spawner, SpawnerRefused, SpawnerUnreachable
from blockyard_api.backends.worker_socket import WorkerSocket
from blockyard_api.host import accounting
from blockyard_api.host.notify import ServiceManager
from blockyard_api.settings import Settings
from blockyard_api.workers.life import State
from blockyard_api.workers.log import WorkerLog, pump
from blockyard_api.workers.readiness import answers
from blockyard_api.workers.records import Records
from blockyard_api.workers.worker import Worker
from blockyard_spawner import protocol

_GRACE = 5.0  # seconds an app has for onStop and onSessionEnded
_STOP_ATTEMPTS = 5
_LAST_WORDS = 2.0  # seconds a pipe may stay open after its worker's end
# Refusals that are the host's fault or the container engine's, and no app's.
_OF_THE_HOST = frozenset({"uid_pool_exhausted", "no_cgroup", "limits_unavailable", "exec_failed", "system_error"})
_OF_THE_HOST |= {"docker_unreachable", "docker_slow", "docker_denied", "docker_refused", "docker_runtime"}
_OF_THE_HOST |= {"no_image", "no_service_network", "network_pool_exhausted"}

Handles = tuple[int, int | None]  # of a worker that runs: its pidfd, and its log's read end if that is still there

log = logging.getLogger(__name__)


class Supervisor:
    """Sees workers through their lives. Nothing here decides who starts, or who is to end."""

    def __init__(
        self,
        settings: Settings,
        spawners: Mapping[str, Spawner],
        records: Records,
        manager: ServiceManager,
        forget: Callable[[WorkerSocket], None],
    ) -> None:
        """Take `forget`, which drops the connections to a worker."""
        self._start_timeout = settings.proxy.worker_start_timeout
        self._spawners = spawners
        self._records = records
        self._manager = manager
        self._forget = forget
        self._cgroups = accounting.cgroup2_mount()
        self.runtime_dirs = {"process": settings.process.runtime_dir, "docker": settings.docker.runtime_dir}

    def know(self, worker: Worker, uid: int, cgroup: str) -> None:
        """Note who a worker is, which opens the way to it."""
        worker.uid, worker.cgroup = uid, cgroup
        worker.cgroup_dir = self._cgroups / cgroup.lstrip("/") if self._cgroups and cgroup else None
        directory = Path(self.runtime_dirs[worker.backend]) / worker.id

        def betrayed(sentence: str) -> None:
            log.error("worker %s of app %s: %s", worker.id, worker.app_id, sentence)
            worker.end(f"ended as an impostor: {sentence}", internal=True)

        worker.socket = WorkerSocket(str(directory), uid, betrayed)

    async def until_gone(self, worker: Worker, app: App, adopted: Handles | None, worker_log: WorkerLog) -> None:
        """See a worker through its life, and word its end; `adopted` holds what one that runs already is held by.

        Cancelled, it leaves the worker alone.
        """
        result = await self._live(worker, app, adopted, worker_log)
        worker.sentence = worker.end_reason = _sentence(worker, result)
        if not worker.ready.done() and (words := await _sandbox_words(worker_log)):
            worker.end_reason = f"{worker.sentence}; {words}"

    async def _live(self, worker: Worker, app: App, adopted: Handles | None, worker_log: WorkerLog) -> Result:
        try:
            pidfd, read_end = adopted or await self._spawn(worker, app)
        except (SpawnerRefused, SpawnerUnreachable) as error:
            worker.host_failed = isinstance(error, SpawnerUnreachable) or error.code in _OF_THE_HOST
            worker.end(error.message.rstrip("."), internal=True)  # it goes into sentences that end by themselves
            return Result("unknown")
        except OSError as error:  # no descriptor is left for a log pipe
            worker.host_failed = True
            worker.end(f"the server could not start it: {error.strerror}", internal=True)
            return Result("unknown")

        def explained(words: bytes) -> Iterator[str]:
            return (f"worker {sentence}" for sentence in worker.limits.saw(words))

        async with asyncio.TaskGroup() as group:
            pumping = None
            if read_end is not None:
                pumping = group.create_task(pump(read_end, worker_log, explained))
            else:
                await worker_log.note("the server was stopped meanwhile; from here on this log is not kept")

            def ran_into(hits: accounting.Hits) -> None:
                for sentence in worker.limits.heard(hits):
                    group.create_task(worker_log.note(f"worker {sentence}"))

            with accounting.told_of_hits(worker.cgroup_dir, ran_into):
                try:
                    await self._serve(worker, pidfd)
                finally:
                    os.close(pidfd)
                if worker.cgroup_dir is not None:  # before the spawner has seen its end, and removed this
                    ran_into(accounting.hits(worker.cgroup_dir))
                result = await self._stop(worker)
            if pumping is not None:
                await asyncio.wait([pumping], timeout=_LAST_WORDS)
                pumping.cancel()
        self._manager.drop_log(worker.id)
        return result

    async def _spawn(self, worker: Worker, app: App) -> Handles:
        request = protocol.Spawn(
            0,
            worker.id,
            "app",
            app.name,
            bundle=worker.bundle_id,
            network=app.network,
            limits=protocol.Limits(memory=app.memory_bytes, cpu=app.cpu_thousandths),
            scratch_copy=app.scratch_copy,
            access=worker.access,
        )
        with contextlib.ExitStack() as opened:
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            opened.callback(os.close, read_end)
            try:
                spawned = await self._spawners[worker.backend].spawn(request, write_end)
            finally:
                os.close(write_end)
            opened.callback(os.close, spawned.pidfd)
            self.know(worker, spawned.uid, spawned.cgroup)
            self._manager.keep_log(worker.id, read_end)
            # after the spawn, while R starts: a worker without a row belongs to nobody, and `sweep` ends it
            await self._records.write(worker)
            opened.pop_all()
            return spawned.pidfd, read_end

    async def _serve(self, worker: Worker, pidfd: int) -> None:
        """Bring a worker to serve and wait for its end."""
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, worker.end, "exited")
        try:
            if worker.state is State.STARTING and await self._becomes_ready(worker):
                worker.become(State.ACTIVE)
                worker.touch()
                worker.ready.set_result(None)
                await self._records.write(worker)
            await asyncio.wait([worker.over])
        finally:
            loop.remove_reader(pidfd)

    async def _becomes_ready(self, worker: Worker) -> bool:
        """Wait for the app's own answer; one that does not come, or cannot be asked for, is the worker's end."""
        within = self._start_timeout
        probe = asyncio.create_task(answers(worker.upstream))
        either: list[asyncio.Future[Any]] = [probe, worker.over]
        try:
            await asyncio.wait(either, timeout=within, return_when=asyncio.FIRST_COMPLETED)
            if not probe.done():
                worker.end(f"it did not answer within {within:.0f} s")
        finally:
            probe.cancel()
            await asyncio.wait([probe])
        if not probe.cancelled() and (error := probe.exception()) is not None:
            worker.end(f"it could not be asked whether it serves: {error}", internal=True)
        return not worker.over.done()

    async def _stop(self, worker: Worker) -> Result:
        """Have the spawner end what is left of a worker, through a restart of the spawner if need be."""
        worker.become(State.STOPPING)
        self._forget(worker.upstream)
        grace = 0.0 if worker.over.result() == "exited" else _GRACE
        for attempt in range(_STOP_ATTEMPTS):
            try:
                return await self._spawners[worker.backend].stop(worker.id, grace)
            except SpawnerRefused:  # it ended while no spawner was there to see it
                return Result("unknown")
            except SpawnerUnreachable:
                await asyncio.sleep(2**attempt * 0.1)
        return Result("unknown")  # `sweep` ends it when the spawner is back


def _sentence(worker: Worker, result: Result) -> str:
    """Word why a worker ended, for its owner."""
    why = worker.over.result() if worker.over.done() else "unknown"
    if result.oom_kills or result.reason == "oom":
        if worker.limits.server_was_full:
            return "was ended since all apps together used the server's memory"
        limit = f"{worker.memory_limit >> 20} MB" if worker.memory_limit else "the memory there is"
        return f"used more than {limit} of memory"
    if why != "exited":
        return why
    number = result.signal
    if number is None and result.status is None:
        return "exited while the spawner was away"
    how = f"exited with status {result.status}" if number is None else f"was ended by signal {number}"
    return how + worker.limits.before_its_end()


async def _sandbox_words(worker_log: WorkerLog) -> str:
    """Return bubblewrap's own last words, which tell the owner why there was no sandbox to run the app in."""
    try:
        tail = await worker_log.tail()
    except OSError:  # its end is told without them
        return ""
    return next((line[:200] for line in reversed(tail.splitlines()) if line.startswith("bwrap: ")), "")
