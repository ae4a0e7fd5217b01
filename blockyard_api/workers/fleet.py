"""All workers: which visitor gets which, when one starts, and when one is to end.

One task lives each worker's whole life, and one synchronous method, `Fleet.place`, hands out all slots: nothing can
come between the look and the reservation.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row

from blockyard_api.apps.catalog import App, Catalog, SwitchedOff
from blockyard_api.backends.spawner import Spawner, SpawnerRefused, SpawnerUnreachable
from blockyard_api.errors import TooMany, Unavailable
from blockyard_api.host import accounting
from blockyard_api.host.notify import ServiceManager
from blockyard_api.settings import Settings
from blockyard_api.store.database import dispensable
from blockyard_api.workers.life import State
from blockyard_api.workers.limits import Limits
from blockyard_api.workers.log import Logs, WorkerLog
from blockyard_api.workers.records import Records
from blockyard_api.workers.setbacks import Setbacks
from blockyard_api.workers.slots import Slots
from blockyard_api.workers.supervisor import Handles, Supervisor
from blockyard_api.workers.worker import StartFailed, Worker

_PLACE_AGAIN = 15.0  # seconds: a page that opens no WebSocket has lost its slot by then
_LOGS_KEPT = 200 << 20  # bytes, of the ended workers of one app
_FILES_SPARE = 0.25  # the share of the files below the runtime directory that is to be left for other workers
_FILES_MANY = 16 << 20  # bytes of kernel memory that no worker's files come to otherwise

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Pool:
    """One app's workers, and how it fared lately."""

    workers: list[Worker] = field(default_factory=list)
    setbacks: Setbacks = field(default_factory=Setbacks)


class Fleet:
    """Decides which workers start and which end, and gives visitors their slots."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        records: Records,
        spawners: Mapping[str, Spawner],
        supervisor: Supervisor,
        logs: Logs,
        manager: ServiceManager,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._records = records
        self._spawners = spawners
        self._known_backends: set[str] = set()  # whose workers of an earlier run are taken over
        self._supervisor = supervisor
        self._logs = logs
        self._manager = manager
        self._tasks = tasks
        self._pools: dict[str, _Pool] = {}
        self._workers: dict[str, Worker] = {}
        self._lives: set[asyncio.Task[None]] = set()
        self._slots = Slots(settings.proxy.max_sessions_per_visitor)
        self._closing = False
        self._news = asyncio.Event()  # of a worker that lives since, or an app that is gone
        self.adopted = asyncio.Event()

    # --- slots ---------------------------------------------------------------------------------------------------

    def place(self, app: App, key: str, holder: str) -> Worker:
        """Reserve a slot of an app for a visitor, starting a worker if none is free; `holder` answers for it.

        Raises NotFound or Unavailable: the app is gone, is switched off, has no bundle, is backing off, or is full;
        and TooMany for a holder of as many slots as one may have.
        """
        if not self.adopted.is_set():
            raise Unavailable("starting", "The server is only just starting; try again.", 5)
        app = self._catalog.get(app.id)  # the caller's may be from before a redeploy
        if not app.enabled:
            raise SwitchedOff
        if not self._slots.may_hold(key, holder):
            raise TooMany(
                "too_many_pages", "As many pages as one may have are open from your address; close one.", _PLACE_AGAIN
            )
        pool = self._pools.get(app.id)
        if pool is not None and (refusal := pool.setbacks.refusal_of(holder)):
            raise refusal
        worker = self._free(app) or self._launch(app)
        self._slots.give(worker, key, holder)
        self.reconcile(app.id)
        return worker

    def hold(self, worker: Worker, key: str, holder: str) -> bool:
        """Reserve a slot of this very worker again for a visitor who comes back; False if there is none for him."""
        if worker.over.done() or worker.state not in (State.STARTING, State.ACTIVE, State.DRAINING):
            return False
        if key in worker.slots:
            return True
        if len(worker.slots) >= worker.capacity or not self._slots.may_hold(key, holder):
            return False
        self._slots.give(worker, key, holder)
        return True

    def leave(self, worker: Worker, key: str) -> None:
        """Free a visitor's slot, if he holds one there."""
        if key not in worker.slots:
            return
        self._slots.take(worker, key)
        if not worker.slots:
            worker.idle_since = time.time()
            self.let_go(worker)

    def let_go(self, worker: Worker) -> None:
        """End a draining worker that has no visitor any more, and answers nothing: a download may still go on."""
        if worker.state is State.DRAINING and not worker.slots and not worker.requests:
            worker.end("redeployed")

    def _free(self, app: App) -> Worker | None:
        fitting = [worker for worker in self._current(app) if len(worker.slots) < worker.capacity]
        # ready ones first, then the fullest: half-empty workers can then end
        return max(fitting, key=lambda worker: (worker.state is State.ACTIVE, len(worker.slots)), default=None)

    def _current(self, app: App) -> list[Worker]:
        return [
            worker
            for worker in self.of(app.id)
            if not self._outdated(worker, app)
            and worker.state in (State.STARTING, State.ACTIVE)
            and not worker.over.done()
        ]

    def backend(self, app: App) -> str:
        """Name the backend that an app's workers are started on."""
        return app.backend or self._settings.server.backend

    def _outdated(self, worker: Worker, app: App) -> bool:
        """Tell whether a worker is not what the app would start now; Docker's runtime is chosen by the access type."""
        moved = worker.backend != self.backend(app) or (worker.backend == "docker" and worker.access != app.access_type)
        return worker.bundle_id != app.active_bundle or moved

    def of(self, app_id: str) -> list[Worker]:
        """Return an app's workers that have not ended."""
        return self._pools[app_id].workers if app_id in self._pools else []

    def find(self, worker_id: str) -> Worker | None:
        """Return a worker that has not ended."""
        return self._workers.get(worker_id)

    def all(self) -> list[Worker]:
        """Return all workers that have not ended."""
        return list(self._workers.values())

    def most_telling(self, app_id: str) -> Worker | None:
        """Return the worker whose log says most: the newest that has visitors, or else the newest that lives."""
        writing = [worker for worker in self.of(app_id) if self._logs.grows(worker.id)]
        return max(writing, key=lambda worker: (bool(worker.slots), worker.started_at), default=None)

    async def first_worker(self, app_id: str) -> Worker | None:
        """Wait until an app has a worker, and return it; None once the app is deleted."""
        while self._catalog.with_id(app_id) is not None:
            if (found := self.most_telling(app_id)) is not None:
                return found
            await self._news.wait()
        return None

    def _tell_news(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    @property
    def count(self) -> int:
        """How many workers have not ended."""
        return len(self._workers)

    def setback(self, app: App) -> str:
        """Why the app's last start failed, for its owner, or nothing."""
        return self._pools[app.id].setbacks.app.why if app.id in self._pools else ""

    def any_active(self, app: App) -> Worker | None:
        """Return some worker that serves the app's bundle now, without reserving anything."""
        return next((worker for worker in self._current(app) if worker.state is State.ACTIVE), None)

    # --- how many ------------------------------------------------------------------------------------------------

    def reconcile(self, app_id: str) -> None:
        """Bring an app's workers in line with its present settings: drain old bundles, keep slots warm."""
        app = self._catalog.with_id(app_id)
        if app is None or self._closing:
            return
        for worker in self.of(app.id):
            worker.capacity = app.max_sessions_per_worker
            if not app.enabled:
                worker.end("the app was disabled")
            elif self._outdated(worker, app) and worker.state in (State.STARTING, State.ACTIVE):
                if worker.state is State.STARTING:
                    worker.end("redeployed")
                else:
                    worker.become(State.DRAINING)
                    self.let_go(worker)
        pool = self._pools.get(app.id)
        if not app.enabled or app.active_bundle is None or (pool and pool.setbacks.app.wait):
            return
        free = self._free_slots(app)
        while free < app.pre_warmed_sessions and self._room(app):
            free += self._launch(app).capacity

    def _free_slots(self, app: App) -> int:
        # a capacity that was lowered may be below what is taken
        return sum(max(0, worker.capacity - len(worker.slots)) for worker in self._current(app))

    def settle(self, app: App) -> None:
        """Forget past failures: a new bundle or a person's wish deserves a start at once."""
        if app.id in self._pools:
            self._pools[app.id].setbacks = Setbacks()

    def end_idle(self) -> None:
        """End workers that no visitor has used for `idle_worker_timeout`, but for the warm slots an app wants."""
        deadline = time.monotonic() - self._settings.proxy.idle_worker_timeout
        for app in self._catalog.all():
            unused = {worker.id for worker in self._current(app) if not worker.slots}
            spare = {worker.id for worker in self._spare(app)}
            for worker in self.of(app.id):
                abandoned = worker.state in (State.ACTIVE, State.DRAINING) and worker.last_activity <= deadline
                if abandoned and not worker.requests and (worker.id in spare or worker.id not in unused):
                    worker.end("idle")

    def _spare(self, app: App) -> list[Worker]:
        """Return the workers without visitors that the app does not want as warm ones, longest unused first."""
        surplus = self._free_slots(app) - app.pre_warmed_sessions
        found: list[Worker] = []
        for worker in sorted(self._current(app), key=lambda worker: worker.last_activity):
            if worker.state is State.ACTIVE and not worker.slots and worker.capacity <= surplus:
                surplus -= worker.capacity
                found.append(worker)
        return found

    def _make_room(self) -> None:
        """Let the worker go that has been unused for longest, so that one app's past rush does not lock the others."""
        if any(worker.over.done() for worker in self._workers.values()):
            return  # there will be room in a moment
        spare = [worker for app in self._catalog.all() for worker in self._spare(app)]
        if spare:
            min(spare, key=lambda worker: worker.last_activity).end("made room for another app")

    def _room(self, app: App) -> bool:
        most = app.max_workers_per_app
        return self.count < self._settings.proxy.max_workers and (most is None or len(self._current(app)) < most)

    # --- limits --------------------------------------------------------------------------------------------------

    async def look_at_limits(self) -> None:
        """Note who had to wait for the processor, and end who takes the files that all workers share."""
        placed = {worker.id: worker for worker in self.all() if worker.cgroup_dir}

        def read() -> tuple[dict[str, accounting.Usage], dict[str, float]]:
            found = {name: accounting.usage(worker.cgroup_dir) for name, worker in placed.items()}
            return found, {
                backend: accounting.files_left(place) for backend, place in self._supervisor.runtime_dirs.items()
            }

        used, files_left = await asyncio.to_thread(read)
        for name, usage in used.items():
            for sentence in placed[name].limits.was_held_back((usage.throttled_usec or 0) / 1e6):
                await self._logs.of(name).note(f"worker {sentence}")
        for backend in [backend for backend, left in files_left.items() if left < _FILES_SPARE]:
            kernel_memory = {name: used[name].kernel_memory or 0 for name in used if placed[name].backend == backend}
            most = max(kernel_memory, key=lambda name: kernel_memory[name], default=None)
            if most is not None and kernel_memory[most] >= _FILES_MANY:
                placed[most].end("made so many files in /run/worker that other apps could not start")
            else:
                log.warning("%s is almost full, and no worker's fault", self._supervisor.runtime_dirs[backend])

    # --- one worker's life ---------------------------------------------------------------------------------------

    def _launch(self, app: App) -> Worker:
        pool = self._pools.setdefault(app.id, _Pool())
        if self._closing:
            raise Unavailable("stopping", "The server is stopping; try again.", 5)
        if app.active_bundle is None:
            raise Unavailable("no_bundle", "This app has nothing to show yet; try again later.")
        if refusal := pool.setbacks.app.refusal():
            raise refusal
        if self.count >= self._settings.proxy.max_workers:
            self._make_room()
            raise Unavailable("server_full", "The server runs as many workers as it may; try again later.", 5)
        if not self._room(app):
            raise Unavailable("app_full", "All places of this app are taken; it is tried again by itself.", 5)
        worker = Worker(
            secrets.token_hex(16),
            app.id,
            app.active_bundle,
            self.backend(app),
            app.access_type,
            app.max_sessions_per_worker,
            self._memory_limit(app),
            Limits(self._settings.process),
            time.time(),
        )
        self._enrol(worker)
        self._start(self._live(worker, app, None))
        return worker

    def _memory_limit(self, app: App) -> int | None:
        """Return what the spawner will hold the app's workers to, in bytes."""
        return app.memory_bytes or self._settings.server.default_memory_limit or self._settings.process.memory_ceiling

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

    async def _live(self, worker: Worker, app: App, adopted: Handles | None) -> None:
        """Live one worker's life; `adopted` holds what one that runs already is held by."""
        with self._logs.writing(worker.id) as worker_log:
            self._tell_news()
            await self._supervisor.until_gone(worker, app, adopted, worker_log)
            if not self._closing:
                await self._finish(worker, app, worker_log)
        worker.ended.set()

    async def _finish(self, worker: Worker, app: App, worker_log: WorkerLog) -> None:
        started = worker.ready.done()
        worker.ended_at = time.time()
        worker.become(State.ENDED)
        await self._records.write(worker)  # before it leaves its pool: who is told of the end finds it among the ended
        pool = self._pools[worker.app_id]
        pool.workers.remove(worker)
        del self._workers[worker.id]
        pool.setbacks.judge(worker, started=started)
        for key in list(worker.slots):
            self._slots.take(worker, key)
        if not started:
            worker.ready.set_exception(
                StartFailed("start_failed", pool.setbacks.app.told or f"The app ended: {worker.told}.")
            )
        await worker_log.note(f"worker ended: {worker.end_reason}")
        with dispensable(log, "logs of ended workers are not looked at"):  # none fills the disk by failing
            await self._logs.keep_within(await self._records.ended_of(app.id), _LOGS_KEPT)
        self.reconcile(app.id)

    # --- from outside --------------------------------------------------------------------------------------------

    async def end_all(self, app: App, why: str) -> None:
        """End all workers of an app and wait until they are gone."""
        leaving = list(self.of(app.id))
        for worker in leaving:
            worker.end(why)
        for worker in leaving:
            await worker.ended.wait()
        if self._catalog.with_id(app.id) is None:
            self._pools.pop(app.id, None)
            self._tell_news()

    def detach(self) -> None:
        """Leave the workers to the next start of this daemon: from now on no end is recorded."""
        self._closing = True

    async def adopt(self, log_pipes: dict[str, int]) -> None:
        """Take over the workers of an earlier run; `log_pipes` are the read ends that systemd kept, by worker.

        The caller sets `adopted` once the sessions are taken over, too: before that, a worker's slots look free.
        Can be tried again after an error. Raises SpawnerUnreachable, SpawnerRefused or StoreUnavailable.
        """
        rows = await self._records.alive()
        running = await self._running({row.backend for row in rows} | self.waited_for())
        lost, waiting = [], set()
        for row in rows:
            if row.id in self._workers:  # by an earlier attempt
                continue
            if row.backend not in running:
                waiting.add(row.id)
                continue
            app = self._catalog.with_id(row.app_id)
            if app is None or row.id not in running[row.backend] or not await self._take_over(row, app, log_pipes):
                lost.append(row.id)
        await self._records.lost(lost)
        self._known_backends |= running.keys()
        for name in log_pipes.keys() - waiting:
            os.close(log_pipes.pop(name))
            self._manager.drop_log(name)

    def waited_for(self) -> set[str]:
        """Name the backends in use whose workers of an earlier run are not taken over yet."""
        used = {self._settings.server.backend, *(self.backend(app) for app in self._catalog.all())}
        return used - self._known_backends

    async def _running(self, backends: set[str]) -> dict[str, set[str]]:
        """Name the workers that run, by backend; only that of the server's own has to be there."""
        found = {}
        for name in backends:
            try:
                listed = await self._spawners[name].list()
            except (SpawnerUnreachable, SpawnerRefused) as error:
                if name == self._settings.server.backend:
                    raise
                log.warning("the workers of backend %s are not taken over yet: %s", name, error.message)
            else:
                found[name] = {entry.id for entry in listed if entry.state == "running"}
        return found

    async def _take_over(self, row: Row[Any], app: App, log_pipes: dict[str, int]) -> bool:
        """Go on with a worker of an earlier run; False if it has just ended."""
        try:
            entry, pidfd = await self._spawners[row.backend].look_up(row.id)
        except SpawnerRefused:
            return False
        if pidfd is None:
            return False
        worker = Worker(
            row.id,
            row.app_id,
            row.bundle_id,
            row.backend,
            row.access_type or app.access_type,
            app.max_sessions_per_worker,
            self._memory_limit(app),
            Limits(self._settings.process),
            row.started_at,
        )
        if row.status in (State.ACTIVE, State.DRAINING):
            worker.state = State(row.status)
            worker.ready.set_result(None)
        self._supervisor.know(worker, entry.uid, entry.cgroup)
        self._enrol(worker)
        self._start(self._live(worker, app, (pidfd, log_pipes.pop(row.id, None))))
        return True

    async def sweep(self, others: Callable[[], Collection[str]] = tuple) -> None:
        """End workers that a spawner runs and nobody here knows: their start was cut off, or this daemon died.

        `others` tells which are known to somebody else here, and is asked only once the spawner has answered.
        """
        for name in self._known_backends:
            try:
                await self._sweep(self._spawners[name], others)
            except (SpawnerUnreachable, SpawnerRefused) as error:
                log.warning("housekeeping of backend %s is put off: %s", name, error.message)

    async def _sweep(self, spawner: Spawner, others: Callable[[], Collection[str]]) -> None:
        for entry in await spawner.list():
            if entry.state == "running" and entry.id not in self._workers and entry.id not in others():
                log.warning("ending worker %s of app %s: it belongs to nobody", entry.id, entry.app)
                with contextlib.suppress(SpawnerRefused):  # it ended meanwhile
                    await spawner.stop(entry.id, 0)
