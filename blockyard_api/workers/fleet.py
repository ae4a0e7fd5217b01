"""All workers: which visitor gets which, when one starts, and why one ends.

One task lives each worker's whole life, and one synchronous method, `Fleet.place`, hands out all slots: nothing can
come between the look and the reservation.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.dialects.sqlite import insert

from blockyard_api.apps.catalog import App, Catalog
from blockyard_api.backends.spawner import Result, Spawner, SpawnerRefused, SpawnerUnreachable
from blockyard_api.backends.worker_socket import WorkerSocket
from blockyard_api.errors import OutOfSpace, Unavailable
from blockyard_api.host.notify import ServiceManager
from blockyard_api.settings import Settings
from blockyard_api.store.database import Database
from blockyard_api.store.tables import workers as table
from blockyard_api.workers.life import State, transition
from blockyard_api.workers.log import Logs, WorkerLog, pump, stamp
from blockyard_api.workers.readiness import answers
from blockyard_spawner import protocol

GRACE = 5.0  # seconds an app has for onStop and onSessionEnded
_LOOK_AGAIN = 0.01  # seconds between two looks for the socket: its directory may be entered but not watched
_BACKOFF_FIRST, _BACKOFF_MOST = 1.0, 60.0  # seconds
_SETTLED = 10.0  # seconds an app must live to count as started well
_STOP_ATTEMPTS = 5
_LAST_WORDS = 2.0  # seconds a pipe may stay open after its worker's end

log = logging.getLogger(__name__)


class StartFailed(Unavailable):
    """A worker did not come to serve; the message is fit for a visitor."""


@dataclass(eq=False, slots=True)
class Worker:
    """A worker as the API knows it. `ready` and `over` are settled exactly once."""

    id: str
    app_id: str
    bundle_id: str
    capacity: int
    memory_limit: int | None
    ready: asyncio.Future[None]
    over: asyncio.Future[str]  # why it is to end: "exited", or the sentence of whoever wished it
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    state: State = State.STARTING
    started_at: float = field(default_factory=time.time)
    ended_at: float | None = None
    end_reason: str | None = None
    last_activity: float = field(default_factory=time.monotonic)
    idle_since: float | None = None  # epoch
    slots: set[str] = field(default_factory=set)
    socket: WorkerSocket | None = None
    cgroup: str = ""
    uid: int | None = None

    def become(self, state: State) -> None:
        """Move on in life. Raises IllegalTransition."""
        self.state = transition(self.state, state)

    @property
    def wished(self) -> bool:
        """Whether somebody asked for the end, rather than the app having failed."""
        return self.over.done() and self.over.result() in _WISHED

    @property
    def upstream(self) -> WorkerSocket:
        """The way to the worker; only one that has started has it."""
        if self.socket is None:
            raise StartFailed("not_started", "The app is not started yet; try again.", retry_after=1)
        return self.socket

    def end(self, why: str) -> None:
        """Ask for the end; the first wish counts."""
        if not self.over.done():
            self.over.set_result(why)

    def touch(self) -> None:
        """Note that a visitor did something."""
        self.last_activity = time.monotonic()


@dataclass(eq=False, slots=True)
class _Pool:
    """One app's workers, and how it fared lately."""

    workers: list[Worker] = field(default_factory=list)
    failures: int = 0
    not_before: float = 0.0  # monotonic
    failure: str = ""


class Fleet:
    """Starts, watches and ends workers, and gives visitors their slots."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        database: Database,
        spawner: Spawner,
        logs: Logs,
        manager: ServiceManager,
        tasks: asyncio.TaskGroup,
        forget: Callable[[WorkerSocket], None],
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._database = database
        self._spawner = spawner
        self._logs = logs
        self._manager = manager
        self._tasks = tasks
        self._forget = forget
        self._pools: dict[str, _Pool] = {}
        self._workers: dict[str, Worker] = {}
        self._lives: set[asyncio.Task[None]] = set()
        self._closing = False
        self.adopted = asyncio.Event()

    # --- slots ---------------------------------------------------------------------------------------------------

    def place(self, app: App, key: str) -> Worker:
        """Reserve a slot of an app for a visitor, starting a worker if none is free.

        Raises Unavailable: the app has no bundle, is backing off, or every slot is taken.
        """
        if not self.adopted.is_set():
            raise SpawnerUnreachable("workers are not adopted yet")
        worker = self._free(app) or self._launch(app)
        worker.slots.add(key)
        worker.idle_since = None
        worker.touch()
        self.reconcile(app)
        return worker

    def hold(self, worker: Worker, key: str) -> bool:
        """Reserve a slot of this very worker again for a visitor who comes back; False if it has none left."""
        if worker.state not in (State.STARTING, State.ACTIVE, State.DRAINING):
            return False
        if key not in worker.slots and len(worker.slots) >= worker.capacity:
            return False
        worker.slots.add(key)
        worker.idle_since = None
        worker.touch()
        return True

    def leave(self, worker: Worker, key: str) -> None:
        """Free a visitor's slot; a draining worker ends with its last one."""
        worker.slots.discard(key)
        if not worker.slots:
            worker.idle_since = time.time()
            if worker.state is State.DRAINING:
                worker.end("redeployed")

    def _free(self, app: App) -> Worker | None:
        fitting = [worker for worker in self._current(app) if len(worker.slots) < worker.capacity]
        # ready ones first, then the fullest: half-empty workers can then end
        return max(fitting, key=lambda worker: (worker.state is State.ACTIVE, len(worker.slots)), default=None)

    def _current(self, app: App) -> list[Worker]:
        return [
            worker
            for worker in self.of(app.id)
            if worker.bundle_id == app.active_bundle
            and worker.state in (State.STARTING, State.ACTIVE)
            and not worker.over.done()
        ]

    def of(self, app_id: str) -> list[Worker]:
        """Return an app's workers that have not ended."""
        return self._pools[app_id].workers if app_id in self._pools else []

    def find(self, worker_id: str) -> Worker | None:
        """Return a worker that has not ended."""
        return self._workers.get(worker_id)

    def all(self) -> list[Worker]:
        """Return all workers that have not ended."""
        return list(self._workers.values())

    @property
    def count(self) -> int:
        """How many workers have not ended."""
        return len(self._workers)

    def failure(self, app: App) -> str:
        """Why the app's last start failed, or nothing."""
        return self._pools[app.id].failure if app.id in self._pools else ""

    def any_active(self, app: App) -> Worker | None:
        """Return some worker that serves the app's bundle now, without reserving anything."""
        return next((worker for worker in self._current(app) if worker.state is State.ACTIVE), None)

    # --- how many ------------------------------------------------------------------------------------------------

    def reconcile(self, app: App) -> None:
        """Bring an app's workers in line with its settings: drain old bundles, keep slots warm."""
        for worker in list(self.of(app.id)):
            worker.capacity = app.max_sessions_per_worker
            if not app.enabled:
                worker.end("the app was disabled")
            elif worker.bundle_id != app.active_bundle and worker.state in (State.STARTING, State.ACTIVE):
                if worker.state is State.ACTIVE:
                    worker.become(State.DRAINING)
                if not worker.slots or worker.state is State.STARTING:
                    worker.end("redeployed")
        pool = self._pools.get(app.id)
        if not app.enabled or app.active_bundle is None or (pool and pool.not_before > time.monotonic()):
            return
        free = sum(worker.capacity - len(worker.slots) for worker in self._current(app))
        while free < app.pre_warmed_sessions and self._room(app):
            free += self._launch(app).capacity

    def settle(self, app: App) -> None:
        """Forget past failures: a new bundle or a person's wish deserves a start at once."""
        if app.id in self._pools:
            pool = self._pools[app.id]
            pool.failures, pool.not_before, pool.failure = 0, 0.0, ""

    def end_idle(self) -> None:
        """End workers that no visitor has used for `idle_worker_timeout`, but for the warm slots an app wants."""
        deadline = time.monotonic() - self._settings.proxy.idle_worker_timeout
        for app in self._catalog.all():
            free = sum(worker.capacity - len(worker.slots) for worker in self._current(app))
            for worker in self.of(app.id):
                if worker.state not in (State.ACTIVE, State.DRAINING) or worker.last_activity > deadline:
                    continue
                if not worker.slots:
                    free -= worker.capacity
                    if free < app.pre_warmed_sessions:
                        free += worker.capacity
                        continue
                worker.end("idle")

    def _room(self, app: App) -> bool:
        most = app.max_workers_per_app
        return self.count < self._settings.proxy.max_workers and (most is None or len(self._current(app)) < most)

    # --- one worker's life ---------------------------------------------------------------------------------------

    def _launch(self, app: App) -> Worker:
        pool = self._pools.setdefault(app.id, _Pool())
        if app.active_bundle is None:
            raise Unavailable("no_bundle", "This app has no bundle yet; deploy one with 'by deploy'.")
        if (wait := pool.not_before - time.monotonic()) > 0:
            raise StartFailed("start_failed", f"{pool.failure} It is tried again in {wait:.0f} s.", retry_after=wait)
        if self.count >= self._settings.proxy.max_workers:
            raise Unavailable("server_full", "The server runs as many workers as it may; try again later.", 10)
        if not self._room(app):
            raise Unavailable("app_full", "All places of this app are taken; it is tried again by itself.", 5)
        loop = asyncio.get_running_loop()
        default = self._settings.server.default_memory_limit
        worker = Worker(
            secrets.token_hex(16),
            app.id,
            app.active_bundle,
            app.max_sessions_per_worker,
            app.memory_bytes or default,
            loop.create_future(),
            loop.create_future(),
        )
        self._enrol(worker)
        self._start(self._live(worker, app, None))
        return worker

    def _enrol(self, worker: Worker) -> None:
        self._workers[worker.id] = worker
        self._pools.setdefault(worker.app_id, _Pool()).workers.append(worker)
        # nobody may be waiting for it any more when it fails
        worker.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())

    def _start(self, life: Coroutine[Any, Any, None]) -> None:
        task = self._tasks.create_task(life)
        self._lives.add(task)
        task.add_done_callback(self._lives.discard)

    def lives(self) -> list[asyncio.Task[None]]:
        """Return the tasks that live workers' lives; cancelled, they leave their workers alone."""
        return list(self._lives)

    async def _live(self, worker: Worker, app: App, adopted: tuple[int, int | None] | None) -> None:
        """Live one worker's life; `adopted` holds the pidfd, and the log's read end, of one that runs already."""
        with self._logs.writing(worker.id) as worker_log:
            result = await self._until_gone(worker, app, adopted, worker_log)
            if not self._closing:
                await self._finish(worker, app, result, worker_log)
        worker.ended.set()

    async def _until_gone(
        self, worker: Worker, app: App, adopted: tuple[int, int | None] | None, worker_log: WorkerLog
    ) -> Result:
        result = Result("unknown")
        try:
            async with asyncio.TaskGroup() as group:
                pidfd, read_end = adopted or await self._spawn(worker, app)
                pump = group.create_task(self._pump(worker, read_end, worker_log)) if read_end is not None else None
                try:
                    await self._serve(worker, pidfd)
                finally:
                    os.close(pidfd)
                result = await self._stop(worker)
                if pump is not None:
                    await asyncio.wait([pump], timeout=_LAST_WORDS)
                    pump.cancel()
        except* (SpawnerRefused, SpawnerUnreachable) as errors:
            worker.end(next(iter(_leaves(errors))).message)
        except* OSError as errors:  # no descriptor or no space left for a log pipe
            worker.end(f"the server could not start it: {next(iter(_leaves(errors)))}")
        return result

    async def _spawn(self, worker: Worker, app: App) -> tuple[int, int | None]:
        request = protocol.Spawn(
            0,
            worker.id,
            "app",
            app.name,
            bundle=worker.bundle_id,
            network=app.network,
            limits=protocol.Limits(memory=app.memory_bytes, cpu=app.cpu_thousandths),
            scratch_copy=app.scratch_copy,
        )
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            spawned = await self._spawner.spawn(request, write_end)
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self._know(worker, spawned.uid, spawned.cgroup)
        self._manager.keep_log(worker.id, read_end)
        # after the spawn, while R starts: a worker without a row belongs to nobody, and `sweep` ends it
        await self._record(worker)
        return spawned.pidfd, read_end

    def _know(self, worker: Worker, uid: int, cgroup: str) -> None:
        worker.uid, worker.cgroup = uid, cgroup
        directory = Path(self._settings.process.runtime_dir) / worker.id

        def betrayed(sentence: str) -> None:
            log.error("worker %s of app %s: %s", worker.id, worker.app_id, sentence)
            worker.end(f"ended as an impostor: {sentence}")

        worker.socket = WorkerSocket(str(directory), uid, betrayed)

    async def _pump(self, worker: Worker, read_end: int, worker_log: WorkerLog) -> None:
        try:
            await pump(read_end, worker_log)
        finally:
            if not self._closing:
                self._manager.drop_log(worker.id)

    async def _serve(self, worker: Worker, pidfd: int) -> None:
        """Bring a worker to serve and wait for its end."""
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, worker.end, "exited")
        try:
            if worker.state is State.STARTING and await self._becomes_ready(worker):
                worker.become(State.ACTIVE)
                worker.touch()
                worker.ready.set_result(None)
                await self._record(worker)
            await asyncio.wait([worker.over])
        finally:
            loop.remove_reader(pidfd)

    async def _becomes_ready(self, worker: Worker) -> bool:
        try:
            async with asyncio.timeout(self._settings.proxy.worker_start_timeout):
                probe = asyncio.create_task(answers(worker.upstream, _LOOK_AGAIN))
                worker.over.add_done_callback(lambda _: probe.cancel())
                try:
                    await asyncio.wait([probe])
                finally:
                    probe.cancel()
                return not probe.cancelled() and probe.exception() is None and not worker.over.done()
        except TimeoutError:
            worker.end(f"it did not answer within {self._settings.proxy.worker_start_timeout:.0f} s")
            return False

    async def _stop(self, worker: Worker) -> Result:
        """Have the spawner end what is left of a worker, through a restart of the spawner if need be."""
        worker.become(State.STOPPING)
        self._forget(worker.upstream)
        grace = 0.0 if worker.over.result() == "exited" else GRACE
        for attempt in range(_STOP_ATTEMPTS):
            try:
                return await self._spawner.stop(worker.id, grace)
            except SpawnerRefused:  # it ended while no spawner was there to see it
                return Result("unknown")
            except SpawnerUnreachable:
                await asyncio.sleep(2**attempt * 0.1)
        return Result("unknown")  # `sweep` ends it when the spawner is back

    async def _finish(self, worker: Worker, app: App, result: Result, worker_log: WorkerLog) -> None:
        started = worker.ready.done()
        worker.end_reason = _sentence(worker, result)
        if not started and (words := _sandbox_words(await worker_log.tail())):
            worker.end_reason = f"{worker.end_reason}; {words}"
        worker.ended_at = time.time()
        worker.become(State.ENDED)
        pool = self._pools[worker.app_id]
        pool.workers.remove(worker)
        del self._workers[worker.id]
        well = started and worker.ended_at - worker.started_at > _SETTLED
        if well or (started and worker.wished):
            pool.failures, pool.not_before, pool.failure = 0, 0.0, ""
        elif not worker.wished:
            pool.failures += 1
            pool.failure = (
                f"The app could not start: {_sentence(worker, result)}."
                if not started
                else (f"The app stopped soon after its start: {worker.end_reason}.")
            )
            pool.not_before = time.monotonic() + min(_BACKOFF_FIRST * 2 ** (pool.failures - 1), _BACKOFF_MOST)
        if not started:
            worker.ready.set_exception(
                StartFailed("start_failed", pool.failure or f"The app ended: {worker.end_reason}.")
            )
        await worker_log.append(stamp(f"worker ended: {worker.end_reason}"))
        await self._record(worker)
        if (current := self._catalog.find(app.id)) is not None:
            self.reconcile(current)

    async def _record(self, worker: Worker) -> None:
        row = {
            "app_id": worker.app_id,
            "bundle_id": worker.bundle_id,
            "status": worker.state.value,
            "uid": worker.uid,
            "cgroup": worker.cgroup,
            "started_at": worker.started_at,
            "ended_at": worker.ended_at,
            "end_reason": worker.end_reason,
        }
        statement = insert(table).values(id=worker.id, **row).on_conflict_do_update(index_elements=["id"], set_=row)
        try:
            async with self._database.begin() as connection:
                await connection.execute(statement)
        except OutOfSpace as error:  # visitors are served all the same; only a restart would not find this worker
            log.warning("worker %s is not recorded: %s", worker.id, error.message)

    # --- from outside --------------------------------------------------------------------------------------------

    async def end_all(self, app: App, why: str) -> None:
        """End all workers of an app and wait until they are gone."""
        leaving = list(self.of(app.id))
        for worker in leaving:
            worker.end(why)
        for worker in leaving:
            await worker.ended.wait()

    def detach(self) -> None:
        """Leave the workers to the next start of this daemon: from now on no end is recorded."""
        self._closing = True

    async def adopt(self, log_pipes: dict[str, int]) -> None:
        """Take over the workers of an earlier run; `log_pipes` are the read ends that systemd kept, by worker.

        Raises SpawnerUnreachable.
        """
        running = {entry.id: entry for entry in await self._spawner.list() if entry.state == "running"}
        alive = table.c.status != State.ENDED.value
        async with self._database.begin() as connection:
            rows = (await connection.execute(select(table).where(alive))).all()
            known = {row.id for row in rows}
            lost = [row.id for row in rows if row.id not in running or self._catalog.find(row.app_id) is None]
            for some in _batches(lost, 500):
                await connection.execute(
                    update(table)
                    .where(table.c.id.in_(some))
                    .values(
                        status=State.ENDED.value, ended_at=time.time(), end_reason="ended while the server was away"
                    )
                )
        loop = asyncio.get_running_loop()
        for row in rows:
            app = self._catalog.find(row.app_id)
            if row.id in lost or app is None:
                continue
            entry, pidfd = await self._spawner.look_up(row.id)
            if pidfd is None:
                continue  # it ended just now; `sweep` and the next adoption settle it
            worker = Worker(
                row.id,
                row.app_id,
                row.bundle_id,
                app.max_sessions_per_worker,
                app.memory_bytes or self._settings.server.default_memory_limit,
                loop.create_future(),
                loop.create_future(),
                started_at=row.started_at,
            )
            if row.status in (State.ACTIVE, State.DRAINING):
                worker.state = State(row.status)
                worker.ready.set_result(None)
            self._know(worker, entry.uid, entry.cgroup)
            self._enrol(worker)
            self._start(self._live(worker, app, (pidfd, log_pipes.pop(row.id, None))))
        for name, descriptor in log_pipes.items():
            os.close(descriptor)
            self._manager.drop_log(name)
        self.adopted.set()
        await self.sweep(known)

    async def sweep(self, known: Iterable[str] = ()) -> None:
        """End workers that the spawner runs and nobody here knows: their start was cut off by this daemon's death."""
        for entry in await self._spawner.list():
            if entry.state == "running" and entry.id not in self._workers:
                log.warning(
                    "ending worker %s of app %s: it belongs to nobody%s",
                    entry.id,
                    entry.app,
                    " any more" if entry.id in set(known) else "",
                )
                await self._spawner.stop(entry.id, 0)


_WISHED = frozenset({"idle", "stopped", "redeployed", "the app was disabled", "the app was deleted"})


def _sentence(worker: Worker, result: Result) -> str:
    """Word why a worker ended, for its owner."""
    why = worker.over.result() if worker.over.done() else "unknown"
    if result.oom_kills or result.reason == "oom":
        limit = f"{worker.memory_limit >> 20} MB" if worker.memory_limit else "the memory there is"
        return f"used more than {limit} of memory"
    if why != "exited":
        return why
    if result.signal is not None:
        return f"was ended by signal {result.signal}"
    if result.status is not None and result.status > 128:  # as a shell and bwrap report a signal
        return f"was ended by signal {result.status - 128}"
    if result.status is not None:
        return f"exited with status {result.status}"
    return "exited while the spawner was away"


def _sandbox_words(tail: str) -> str:
    """Return bubblewrap's own last words, which tell the owner why there was no sandbox to run the app in."""
    return next((line[:200] for line in reversed(tail.splitlines()) if line.startswith("bwrap: ")), "")


def _leaves(errors: BaseExceptionGroup[Any]) -> Iterable[Any]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _batches(items: list[str], size: int) -> Iterable[list[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
