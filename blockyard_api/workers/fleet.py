"""All workers: which visitor gets which, when one starts, and why one ends.

One task lives each worker's whole life, and one synchronous method, `Fleet.place`, hands out all slots: nothing can
come between the look and the reservation.
"""

import asyncio
import contextlib
import logging
import math
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Row, select, update
from sqlalchemy.dialects.sqlite import insert

from blockyard_api.apps.catalog import App, Catalog, SwitchedOff
from blockyard_api.backends.spawner import Result, Spawner, SpawnerRefused, SpawnerUnreachable
from blockyard_api.backends.worker_socket import WorkerSocket
from blockyard_api.errors import TooMany, Unavailable
from blockyard_api.host import accounting
from blockyard_api.host.notify import ServiceManager
from blockyard_api.settings import Settings
from blockyard_api.store.database import Database, dispensable
from blockyard_api.store.tables import workers as table
from blockyard_api.workers.life import State, transition
from blockyard_api.workers.limits import Limits
from blockyard_api.workers.log import Logs, WorkerLog, pump
from blockyard_api.workers.readiness import answers
from blockyard_spawner import protocol

GRACE = 5.0  # seconds an app has for onStop and onSessionEnded
_LOOK_AGAIN = 0.01  # seconds between two looks for the socket: its directory may be entered but not watched
_BACKOFF_FIRST, _BACKOFF_MOST = 1.0, 60.0  # seconds
_HOST_PAUSE = 2.0  # seconds until a start that failed for the host's sake is tried again
# Refusals that are the host's fault or the container engine's, and no app's.
_OF_THE_HOST = frozenset({"uid_pool_exhausted", "no_cgroup", "limits_unavailable", "exec_failed", "system_error"})
_OF_THE_HOST |= {"docker_unreachable", "docker_slow", "docker_denied", "docker_refused", "docker_runtime"}
_OF_THE_HOST |= {"no_image", "no_service_network", "network_pool_exhausted"}
_PLACE_AGAIN = 15.0  # seconds: a page that opens no WebSocket has lost its slot by then
_SETTLED = 10.0  # seconds an app must live to count as started well
_STOP_ATTEMPTS = 5
_LAST_WORDS = 2.0  # seconds a pipe may stay open after its worker's end
_LOGS_KEPT = 200 << 20  # bytes, of the ended workers of one app
_LOGS_LOOKED_AT = 5000
_FILES_SPARE = 0.25  # the share of the files below the runtime directory that is to be left for other workers
_FILES_MANY = 16 << 20  # bytes of kernel memory that no worker's files come to otherwise

log = logging.getLogger(__name__)


class StartFailed(Unavailable):
    """A worker did not come to serve; the message is fit for a visitor."""


@dataclass(eq=False, slots=True)
class Worker:
    """A worker as the API knows it. `ready` and `over` are settled exactly once."""

    id: str
    app_id: str
    bundle_id: str
    backend: str
    access: str  # who could visit when it started
    capacity: int
    memory_limit: int | None
    limits: Limits
    ready: asyncio.Future[None]
    over: asyncio.Future[str]  # why it is to end: "exited", or the sentence of whoever wished it
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    state: State = State.STARTING
    started_at: float = field(default_factory=time.time)
    ended_at: float | None = None
    end_reason: str | None = None
    last_activity: float = field(default_factory=time.monotonic)
    idle_since: float | None = None  # epoch
    requests: int = 0  # under way; an open WebSocket is none
    slots: dict[str, str] = field(default_factory=dict)  # a session's key → who answers for it
    internal: bool = False  # what it ended of tells of the server, and is for the app's owner alone
    host_failed: bool = False  # there was no start, and the app is not to blame
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

    @property
    def told(self) -> str:
        """How it ended, for a visitor."""
        return _WITHHELD if self.internal else self.end_reason or "is gone"

    def end(self, why: str, *, internal: bool = False) -> None:
        """Ask for the end; the first wish counts. `internal`: visitors are not to read why."""
        if not self.over.done():
            self.internal = internal
            self.over.set_result(why)

    def touch(self) -> None:
        """Note that a visitor did something."""
        self.last_activity = time.monotonic()


@dataclass(eq=False, slots=True)
class _Setback:
    """How often something failed in a row, why, and until when it is not tried again."""

    failures: int = 0
    not_before: float = 0.0  # monotonic
    why: str = ""  # for the app's owner
    told: str = ""  # for visitors

    @property
    def wait(self) -> int:
        """Seconds until the next try, rounded up."""
        return max(0, math.ceil(self.not_before - time.monotonic()))

    @property
    def forgiven(self) -> bool:
        """Whether it is so long ago that the next one would be a first."""
        return self.not_before + _BACKOFF_MOST < time.monotonic()

    def refusal(self) -> StartFailed | None:
        """Return what a visitor is told while it is not tried again."""
        wait = self.wait
        return StartFailed("start_failed", f"{self.told} It is tried again in {wait} s.", wait) if wait else None

    def grow(self, why: str, told: str) -> None:
        """Note one more failure; each doubles the wait."""
        self.failures += 1
        self.pause(why, told, min(_BACKOFF_FIRST * 2 ** (self.failures - 1), _BACKOFF_MOST))

    def pause(self, why: str, told: str, seconds: float) -> None:
        """Note a failure that is nobody's fault here."""
        self.why, self.told, self.not_before = why, told, time.monotonic() + seconds


@dataclass(eq=False, slots=True)
class _Pool:
    """One app's workers, and how it fared lately: by itself, and in whose hands."""

    workers: list[Worker] = field(default_factory=list)
    setback: _Setback = field(default_factory=_Setback)
    visitors: dict[str, _Setback] = field(default_factory=dict)

    def blame(self, visitors: Iterable[str], why: str, told: str) -> None:
        """Note that a worker fell under these visitors."""
        self.visitors = {who: setback for who, setback in self.visitors.items() if not setback.forgiven}
        for who in set(visitors):
            self.visitors.setdefault(who, _Setback()).grow(why, told)

    def clear(self, visitors: Iterable[str]) -> None:
        """Note that a worker lived well under these visitors."""
        self.setback = _Setback()
        for who in visitors:
            self.visitors.pop(who, None)


class Fleet:
    """Starts, watches and ends workers, and gives visitors their slots."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        database: Database,
        spawners: Mapping[str, Spawner],
        logs: Logs,
        manager: ServiceManager,
        tasks: asyncio.TaskGroup,
        forget: Callable[[WorkerSocket], None],
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._database = database
        self._spawners = spawners
        self._known_backends: set[str] = set()  # whose workers of an earlier run are taken over
        self._logs = logs
        self._manager = manager
        self._tasks = tasks
        self._forget = forget
        self._pools: dict[str, _Pool] = {}
        self._workers: dict[str, Worker] = {}
        self._lives: set[asyncio.Task[None]] = set()
        self._held: dict[str, Counter[str]] = {}  # who answers for a slot → the keys, and how many workers each is on
        self._closing = False
        self._news = asyncio.Event()  # of a worker that lives since, or an app that is gone
        self._cgroups = accounting.cgroup2_mount()
        self._runtime_dirs = {"process": settings.process.runtime_dir, "docker": settings.docker.runtime_dir}
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
        if not self._may_hold(key, holder):
            raise TooMany(
                "too_many_pages", "As many pages as one may have are open from your address; close one.", _PLACE_AGAIN
            )
        pool = self._pools.get(app.id)
        if pool is not None and holder in pool.visitors and (refusal := pool.visitors[holder].refusal()):
            raise refusal
        worker = self._free(app) or self._launch(app)
        self._give(worker, key, holder)
        self.reconcile(app.id)
        return worker

    def hold(self, worker: Worker, key: str, holder: str) -> bool:
        """Reserve a slot of this very worker again for a visitor who comes back; False if there is none for him."""
        if worker.over.done() or worker.state not in (State.STARTING, State.ACTIVE, State.DRAINING):
            return False
        if key in worker.slots:
            return True
        if len(worker.slots) >= worker.capacity or not self._may_hold(key, holder):
            return False
        self._give(worker, key, holder)
        return True

    def _may_hold(self, key: str, holder: str) -> bool:
        held = self._held.get(holder, Counter())
        return key in held or len(held) < self._settings.proxy.max_sessions_per_visitor

    def _give(self, worker: Worker, key: str, holder: str) -> None:
        self._take(worker, key)
        worker.slots[key] = holder
        self._held.setdefault(holder, Counter())[key] += 1
        worker.idle_since = None
        worker.touch()

    def leave(self, worker: Worker, key: str) -> None:
        """Free a visitor's slot, if he holds one there."""
        if key not in worker.slots:
            return
        self._take(worker, key)
        if not worker.slots:
            worker.idle_since = time.time()
            self.let_go(worker)

    def let_go(self, worker: Worker) -> None:
        """End a draining worker that has no visitor any more, and answers nothing: a download may still go on."""
        if worker.state is State.DRAINING and not worker.slots and not worker.requests:
            worker.end("redeployed")

    def _take(self, worker: Worker, key: str) -> None:
        if (holder := worker.slots.pop(key, None)) is not None:
            held = self._held[holder]
            held[key] -= 1
            if not held[key]:
                del held[key]
            if not held:
                del self._held[holder]

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
        return self._pools[app.id].setback.why if app.id in self._pools else ""

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
        if not app.enabled or app.active_bundle is None or (pool and pool.setback.wait):
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
            self._pools[app.id].clear(list(self._pools[app.id].visitors))

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

    def cgroup(self, worker: Worker) -> Path | None:
        """Return the directory of a worker's cgroup, if it has one."""
        return self._cgroups / worker.cgroup.lstrip("/") if self._cgroups and worker.cgroup else None

    async def look_at_limits(self) -> None:
        """Note who had to wait for the processor, and end who takes the files that all workers share."""
        placed = {worker.id: worker for worker in self.all() if self.cgroup(worker)}

        def read() -> tuple[dict[str, accounting.Usage], dict[str, float]]:
            found = {name: accounting.usage(self.cgroup(worker)) for name, worker in placed.items()}
            return found, {backend: accounting.files_left(place) for backend, place in self._runtime_dirs.items()}

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
                log.warning("%s is almost full, and no worker's fault", self._runtime_dirs[backend])

    # --- one worker's life ---------------------------------------------------------------------------------------

    def _launch(self, app: App) -> Worker:
        pool = self._pools.setdefault(app.id, _Pool())
        if self._closing:
            raise Unavailable("stopping", "The server is stopping; try again.", 5)
        if app.active_bundle is None:
            raise Unavailable("no_bundle", "This app has nothing to show yet; try again later.")
        if refusal := pool.setback.refusal():
            raise refusal
        if self.count >= self._settings.proxy.max_workers:
            self._make_room()
            raise Unavailable("server_full", "The server runs as many workers as it may; try again later.", 5)
        if not self._room(app):
            raise Unavailable("app_full", "All places of this app are taken; it is tried again by itself.", 5)
        loop = asyncio.get_running_loop()
        worker = Worker(
            secrets.token_hex(16),
            app.id,
            app.active_bundle,
            self.backend(app),
            app.access_type,
            app.max_sessions_per_worker,
            self._memory_limit(app),
            Limits(self._settings.process),
            loop.create_future(),
            loop.create_future(),
            started_at=time.time(),
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

    async def _live(self, worker: Worker, app: App, adopted: tuple[int, int | None] | None) -> None:
        """Live one worker's life; `adopted` holds the pidfd, and the log's read end, of one that runs already."""
        with self._logs.writing(worker.id) as worker_log:
            self._tell_news()
            result = await self._until_gone(worker, app, adopted, worker_log)
            if not self._closing:
                await self._finish(worker, app, result, worker_log)
        worker.ended.set()

    async def _until_gone(
        self, worker: Worker, app: App, adopted: tuple[int, int | None] | None, worker_log: WorkerLog
    ) -> Result:
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
        async with asyncio.TaskGroup() as group:
            pump = None
            if read_end is not None:
                pump = group.create_task(self._pump(worker, read_end, worker_log))
            else:
                await worker_log.note("the server was stopped meanwhile; from here on this log is not kept")

            def ran_into(hits: accounting.Hits) -> None:
                for sentence in worker.limits.heard(hits):
                    group.create_task(worker_log.note(f"worker {sentence}"))

            cgroup = self.cgroup(worker)
            with accounting.told_of_hits(cgroup, ran_into):
                try:
                    await self._serve(worker, pidfd)
                finally:
                    os.close(pidfd)
                if cgroup is not None:  # before the spawner has seen its end, and removed this
                    ran_into(accounting.hits(cgroup))
                result = await self._stop(worker)
            if pump is not None:
                await asyncio.wait([pump], timeout=_LAST_WORDS)
                pump.cancel()
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
            self._know(worker, spawned.uid, spawned.cgroup)
            self._manager.keep_log(worker.id, read_end)
            # after the spawn, while R starts: a worker without a row belongs to nobody, and `sweep` ends it
            await self._record(worker)
            opened.pop_all()
            return spawned.pidfd, read_end

    def _know(self, worker: Worker, uid: int, cgroup: str) -> None:
        worker.uid, worker.cgroup = uid, cgroup
        directory = Path(self._runtime_dirs[worker.backend]) / worker.id

        def betrayed(sentence: str) -> None:
            log.error("worker %s of app %s: %s", worker.id, worker.app_id, sentence)
            worker.end(f"ended as an impostor: {sentence}", internal=True)

        worker.socket = WorkerSocket(str(directory), uid, betrayed)

    async def _pump(self, worker: Worker, read_end: int, worker_log: WorkerLog) -> None:
        try:
            await pump(
                read_end, worker_log, lambda words: (f"worker {sentence}" for sentence in worker.limits.saw(words))
            )
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
        """Wait for the app's own answer; one that does not come, or cannot be asked for, is the worker's end."""
        within = self._settings.proxy.worker_start_timeout
        probe = asyncio.create_task(answers(worker.upstream, _LOOK_AGAIN))
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
        grace = 0.0 if worker.over.result() == "exited" else GRACE
        for attempt in range(_STOP_ATTEMPTS):
            try:
                return await self._spawners[worker.backend].stop(worker.id, grace)
            except SpawnerRefused:  # it ended while no spawner was there to see it
                return Result("unknown")
            except SpawnerUnreachable:
                await asyncio.sleep(2**attempt * 0.1)
        return Result("unknown")  # `sweep` ends it when the spawner is back

    async def _finish(self, worker: Worker, app: App, result: Result, worker_log: WorkerLog) -> None:
        started = worker.ready.done()
        sentence = worker.end_reason = _sentence(worker, result)
        if not started and (words := await _sandbox_words(worker_log)):
            worker.end_reason = f"{worker.end_reason}; {words}"
        worker.ended_at = time.time()
        worker.become(State.ENDED)
        await self._record(worker)  # before it leaves its pool: whoever is told of the end finds it among the ended
        pool = self._pools[worker.app_id]
        pool.workers.remove(worker)
        del self._workers[worker.id]
        told = _WITHHELD if worker.internal else sentence  # and what bubblewrap said is for the owner, too
        self._judge(worker, pool, told, started=started)
        for key in list(worker.slots):
            self._take(worker, key)
        if not started:
            worker.ready.set_exception(StartFailed("start_failed", pool.setback.told or f"The app ended: {told}."))
        await worker_log.note(f"worker ended: {worker.end_reason}")
        await self._bound_logs(app.id)
        self.reconcile(app.id)

    async def _bound_logs(self, app_id: str) -> None:
        """Delete the oldest logs of an app whose ended workers wrote too much: none fills the disk by failing."""
        ended = select(table.c.id).where(table.c.app_id == app_id, table.c.status == State.ENDED.value)
        with dispensable(log, "logs of ended workers are not looked at"):
            async with self._database.begin() as connection:
                rows = await connection.execute(ended.order_by(table.c.ended_at.desc()).limit(_LOGS_LOOKED_AT))
                newest_first = [row.id for row in rows]
            await self._logs.keep_within(newest_first, _LOGS_KEPT)

    def _judge(self, worker: Worker, pool: _Pool, told: str, *, started: bool) -> None:
        """Note who is to wait for an end like this, which visitors are `told` of in these words.

        A start that fails is the app's fault, or the host's. A worker that had come to serve and falls at once does
        so in somebody's hands: a visitor who can crash the app keeps himself from it, and nobody else.
        """
        lived = (worker.ended_at or time.time()) - worker.started_at
        if started and (worker.wished or lived > _SETTLED):
            pool.clear(worker.slots.values())
            return
        if worker.wished:
            return
        what = "stopped soon after its start" if started else "could not start"
        why, told = (f"The app {what}: {reason}." for reason in (worker.end_reason, told))
        if worker.host_failed:
            pool.setback.pause(why, told, _HOST_PAUSE)
        elif started and worker.slots:
            pool.blame(worker.slots.values(), why, told)
        else:
            pool.setback.grow(why, told)

    async def _record(self, worker: Worker) -> None:
        row = {
            "app_id": worker.app_id,
            "bundle_id": worker.bundle_id,
            "status": worker.state.value,
            "backend": worker.backend,
            "access_type": worker.access,
            "uid": worker.uid,
            "cgroup": worker.cgroup,
            "started_at": worker.started_at,
            "ended_at": worker.ended_at,
            "end_reason": worker.end_reason,
        }
        statement = insert(table).values(id=worker.id, **row).on_conflict_do_update(index_elements=["id"], set_=row)
        # Visitors are served; only a restart would not find it.
        with dispensable(log, f"worker {worker.id} is not recorded"):
            async with self._database.begin() as connection:
                await connection.execute(statement)

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
        alive = table.c.status != State.ENDED.value
        async with self._database.begin() as connection:
            rows = (await connection.execute(select(table).where(alive))).all()
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
        async with self._database.begin() as connection:
            for some in _batches(lost, 500):
                ended = {
                    "status": State.ENDED.value,
                    "ended_at": time.time(),
                    "end_reason": "ended while the server was away",
                }
                await connection.execute(update(table).where(table.c.id.in_(some)).values(**ended))
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
        loop = asyncio.get_running_loop()
        worker = Worker(
            row.id,
            row.app_id,
            row.bundle_id,
            row.backend,
            row.access_type or app.access_type,
            app.max_sessions_per_worker,
            self._memory_limit(app),
            Limits(self._settings.process),
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


_WITHHELD = "failed for a reason that its owner can see"
_WISHED = frozenset({"idle", "made room for another app", "redeployed", "the app was disabled", "the app was deleted"})


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
    if number is None and result.status is not None and result.status > 128:  # as a shell and bwrap report a signal
        number = result.status - 128
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


def _batches(items: list[str], size: int) -> Iterable[list[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
