"""Deployments: an uploaded archive becomes a bundle, the bundle becomes what the app serves, old ones are pruned."""

import asyncio
import contextlib
import errno
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import delete, insert, select, update

from blockyard_api.apps.catalog import App, Catalog
from blockyard_api.bundles.archive import BundleRefused, unpack
from blockyard_api.bundles.removal import discard, remove
from blockyard_api.clock import rfc3339
from blockyard_api.errors import BlockyardError, Conflict, NotFound, OutOfSpace, TooLarge
from blockyard_api.settings import Storage
from blockyard_api.store.database import Database, StoreUnavailable
from blockyard_api.store.tables import bundles, tasks, workers
from blockyard_api.workers.fleet import Fleet
from blockyard_api.workers.life import State

DELETED_APPS_KEPT = 30 * 86400.0  # seconds
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNPACKED_AT_ONCE = 4  # processes; further deployments wait
_SERVED = "The app serves this bundle now."
_DELETED = "The app was deleted meanwhile; nothing was deployed."
_RESTARTED = "The server was restarted meanwhile; deploy again."
_OVERTAKEN = "A later upload is served already; 'by rollback' serves this one."

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bundle:
    """One upload of an app."""

    id: str
    app_id: str
    status: str  # pending, building, ready or failed
    uploaded_at: float
    deployed_at: float | None
    deployed_by: str
    pinned: bool
    reason: str | None = None  # why it failed


@dataclass(frozen=True, slots=True)
class Task:
    """A deployment's progress."""

    id: str
    app_id: str
    status: str  # running, completed or failed
    created_at: float
    log: str


class Deployments:
    """Receives, unpacks, activates and prunes bundles."""

    def __init__(
        self, settings: Storage, catalog: Catalog, fleet: Fleet, database: Database, group: asyncio.TaskGroup
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._fleet = fleet
        self._database = database
        self._group = group
        self._uploads = Path(settings.state_dir) / "uploads"
        self._bundles = Path(settings.state_dir) / "bundles"
        self._changed: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unpacking = asyncio.Semaphore(_UNPACKED_AT_ONCE)
        self._switching = asyncio.Lock()  # so that nothing is pruned while it is being activated

    async def receive(self, app: App, body: AsyncIterator[bytes], announced: int | None, by: str) -> tuple[str, str]:
        """Take an upload in and start its deployment; return the ids of bundle and task.

        Raises TooLarge or OutOfSpace; nothing is kept then.
        """
        if announced is not None and announced > self._settings.max_bundle_size:
            raise self._too_large()
        bundle_id, task_id = secrets.token_hex(16), secrets.token_hex(16)
        archive = self._uploads / bundle_id
        try:
            await self._write(archive, body)
            await self._register(app, bundle_id, task_id, by)
        except BaseException:
            archive.unlink(missing_ok=True)
            raise
        self._changed[task_id] = asyncio.Event()
        task = self._group.create_task(self._deploy(app.id, bundle_id, task_id, archive))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return bundle_id, task_id

    def running(self) -> list[asyncio.Task[None]]:
        """Return the deployments under way; cancelled, they are told as failed at the next start."""
        return list(self._tasks)

    async def _write(self, archive: Path, body: AsyncIterator[bytes]) -> None:
        size = 0
        try:
            with archive.open("xb") as file:
                async for chunk in body:
                    size += len(chunk)
                    if size > self._settings.max_bundle_size:
                        raise self._too_large()
                    await asyncio.to_thread(file.write, chunk)
        except OSError as error:
            if error.errno in _FULL:
                raise OutOfSpace(
                    "disk_full", "The server's disk is full; free space in the state directory and try again."
                ) from error
            raise

    async def _register(self, app: App, bundle_id: str, task_id: str, by: str) -> None:
        now = time.time()
        bundle = {"id": bundle_id, "app_id": app.id, "status": "pending", "uploaded_at": now, "deployed_by": by}
        task = {"id": task_id, "app_id": app.id, "status": "running", "created_at": now, "log": ""}
        async with self._database.begin() as connection:
            await connection.execute(insert(bundles).values(**bundle, pinned=False))
            await connection.execute(insert(tasks).values(**task))

    def _too_large(self) -> TooLarge:
        limit = self._settings.max_bundle_size >> 20
        return TooLarge(
            "bundle_too_large", f"A bundle may have {limit} MB; leave out data, or raise storage.max_bundle_size."
        )

    async def _deploy(self, app_id: str, bundle_id: str, task_id: str, archive: Path) -> None:
        try:
            await self._say(task_id, "Unpacking the bundle.")
            await self._set_status(bundle_id, "building")
            async with self._unpacking:
                info = await unpack(archive, self._bundles / bundle_id)
            await self._say(task_id, f"Unpacked {info.files} files, {info.size} bytes; entry point {info.entry}.")
            async with self._switching:
                served = await self._finish(app_id, bundle_id)
            await self._say(task_id, _SERVED if served else _OVERTAKEN, status="completed")
        except (BundleRefused, BlockyardError) as error:  # or the app was deleted meanwhile, or the disk is full
            await self._fail(app_id, bundle_id, task_id, error.message)
        except OSError as error:
            log.exception("deployment of bundle %s", bundle_id)
            await self._fail(app_id, bundle_id, task_id, f"The server could not store the bundle: {error.strerror}.")
        finally:
            with contextlib.suppress(OSError):  # `recover` removes it at the next start
                await asyncio.to_thread(archive.unlink, missing_ok=True)
            self._changed.pop(task_id, asyncio.Event()).set()

    async def _fail(self, app_id: str, bundle_id: str, task_id: str, message: str) -> None:
        try:
            async with self._switching:
                app = self._catalog.with_id(app_id)
                if app is None:
                    message = _DELETED
                served = app is not None and app.active_bundle == bundle_id  # what failed is what comes after that
                if not served:
                    await asyncio.to_thread(discard, self._bundles / bundle_id)
                    await self._set_status(bundle_id, "failed", message)
            told = f"{_SERVED} Something after that failed: {message}" if served else message
            await self._say(task_id, told, status="completed" if served else "failed")
        except (OutOfSpace, StoreUnavailable):  # `recover` tells it at the next start
            log.exception("deployment of bundle %s failed (%s), and that could not be stored", bundle_id, message)

    async def _set_status(self, bundle_id: str, status: str, reason: str | None = None) -> None:
        change = update(bundles).where(bundles.c.id == bundle_id).values(status=status, reason=reason)
        async with self._database.begin() as connection:
            await connection.execute(change)

    async def _say(self, task_id: str, sentence: str, status: str = "running") -> None:
        line = f"{rfc3339(time.time())} {sentence}\n"
        async with self._database.begin() as connection:
            change = update(tasks).where(tasks.c.id == task_id).values(log=tasks.c.log + line, status=status)
            await connection.execute(change)
        if task_id in self._changed:
            changed, self._changed[task_id] = self._changed[task_id], asyncio.Event()
            changed.set()

    async def _finish(self, app_id: str, bundle_id: str) -> bool:
        """Let the app serve a bundle that is whole, unless a later upload was faster."""
        await self._set_status(bundle_id, "ready")
        app = self._catalog.get(app_id)
        uploads = [bundle.id for bundle in await self.list(app)]  # newest first
        overtaken = app.active_bundle in uploads[: uploads.index(bundle_id)]
        if not overtaken:
            await self._activate(app, bundle_id)
        await self._prune(app_id)
        return not overtaken

    async def _activate(self, app: App, bundle_id: str) -> App:
        app = await self._catalog.change(app, {"active_bundle": bundle_id})
        async with self._database.begin() as connection:
            await connection.execute(update(bundles).where(bundles.c.id == bundle_id).values(deployed_at=time.time()))
        self._fleet.settle(app)
        self._fleet.reconcile(app.id)
        return app

    async def rollback(self, app: App, bundle_id: str | None) -> App:
        """Serve an earlier bundle: the one named, or the last that was served before. Raises NotFound or Conflict."""
        async with self._switching:
            return await self._roll_back(self._catalog.get(app.id), bundle_id)

    async def _roll_back(self, app: App, bundle_id: str | None) -> App:
        ready = [bundle for bundle in await self.list(app) if bundle.status == "ready"]
        if bundle_id is None:
            earlier = [bundle for bundle in ready if bundle.deployed_at and bundle.id != app.active_bundle]
            if not earlier:
                raise Conflict("no_earlier_bundle", "There is no earlier bundle to go back to.")
            return await self._activate(app, max(earlier, key=lambda bundle: bundle.deployed_at or 0).id)
        if bundle_id not in {bundle.id for bundle in ready}:
            raise NotFound("not_found", "This app has no such bundle that is ready; 'by bundles' names them.")
        return await self._activate(app, bundle_id)

    async def list(self, app: App) -> list[Bundle]:
        """Return an app's bundles, newest first."""
        query = select(bundles).where(bundles.c.app_id == app.id).order_by(bundles.c.uploaded_at.desc())
        async with self._database.begin() as connection:
            return [Bundle(**row._mapping) for row in (await connection.execute(query)).all()]

    async def task(self, task_id: str) -> Task:
        """Return a deployment's progress. Raises NotFound."""
        async with self._database.begin() as connection:
            row = (await connection.execute(select(tasks).where(tasks.c.id == task_id))).first()
        if row is None:
            raise NotFound("not_found", "There is no such task.")
        return Task(**row._mapping)

    async def follow(self, task_id: str) -> AsyncIterator[str]:
        """Yield a task's log as it grows, until the task is over."""
        sent = 0
        while True:
            changed = self._changed.get(task_id)
            task = await self.task(task_id)
            if len(task.log) > sent:
                yield task.log[sent:]
                sent = len(task.log)
            if task.status != "running" or changed is None:
                return
            await changed.wait()

    async def _prune(self, app_id: str) -> None:
        """Delete the oldest bundles beyond the retention; never the active one, a pinned one, or one in use."""
        app = self._catalog.get(app_id)
        in_use = {worker.bundle_id for worker in self._fleet.of(app_id)} | {app.active_bundle}
        # nor one of a worker of an earlier run, which the fleet may not have taken over yet
        alive = select(workers.c.bundle_id).where(workers.c.app_id == app_id, workers.c.status != State.ENDED.value)
        async with self._database.begin() as connection:
            in_use.update((await connection.scalars(alive)).all())
        kept = [bundle for bundle in await self.list(app) if bundle.status in ("ready", "failed")]
        for bundle in kept[self._settings.bundle_retention :]:
            if bundle.id not in in_use and not bundle.pinned:
                await self._remove(bundle.id)

    async def _remove(self, bundle_id: str) -> None:
        async with self._database.begin() as connection:  # first: a bundle that is listed has its files
            await connection.execute(delete(bundles).where(bundles.c.id == bundle_id))
        await asyncio.to_thread(discard, self._bundles / bundle_id)

    async def purge_deleted(self) -> None:
        """Delete what is left of apps that were deleted long ago."""
        before = time.time() - DELETED_APPS_KEPT
        for app in await self._catalog.deleted():
            if app.deleted_at is not None and app.deleted_at < before:
                for bundle in await self.list(app):
                    await self._remove(bundle.id)
        await self._catalog.purge(before)

    async def prune_tasks(self, retention: float) -> None:
        """Forget deployments that began `retention` seconds ago and are over."""
        old = (tasks.c.status != "running") & (tasks.c.created_at < time.time() - retention)
        async with self._database.begin() as connection:
            await connection.execute(delete(tasks).where(old))

    async def recover(self) -> None:
        """Clear up after a death in the middle: half uploads go, half deployments are told as failed."""
        unfinished = bundles.c.status.in_(["pending", "building"])
        line = f"{rfc3339(time.time())} {_RESTARTED}\n"
        async with self._database.begin() as connection:
            await connection.execute(update(bundles).where(unfinished).values(status="failed", reason=_RESTARTED))
            running = update(tasks).where(tasks.c.status == "running")
            await connection.execute(running.values(status="failed", log=tasks.c.log + line))
            whole = select(bundles.c.id).where(bundles.c.status == "ready")
            ready = {row.id for row in await connection.execute(whole)}
        await asyncio.to_thread(_clear, self._uploads, self._bundles, ready)


def _clear(uploads: Path, directory: Path, ready: set[str]) -> None:
    """Remove what is no bundle; what cannot be removed, such as a file system's lost+found, does not stop the start."""
    for path in (*uploads.iterdir(), *directory.iterdir()):
        if path.parent == directory and path.name in ready:
            continue
        try:
            if path.is_dir() and not path.is_symlink():
                remove(path)
            else:
                path.unlink()
        except OSError as error:
            log.warning("%s is no bundle and cannot be removed: %s", path, error)
