"""The one way to the database: an asynchronous engine on SQLite (WAL), brought up to date at start."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from blockyard_api.errors import BlockyardError, OutOfSpace, Unavailable
from blockyard_api.host import child

SCHEMA = "0005"  # head of `migrations`; a test compares
MIGRATED_WITHIN = 300.0  # seconds; TimeoutStartSec= of the API's unit is longer

log = logging.getLogger(__name__)


class MigrationFailed(BlockyardError):
    """The database could not be brought to this version's schema."""


class StoreUnavailable(Unavailable):
    """The database cannot be used at the moment: it is locked, no descriptor is left to open it, or it is read-only."""


@contextmanager
def dispensable(to: logging.Logger, otherwise: str) -> Iterator[None]:
    """Do without the database where it can be neither written nor read: say what is `otherwise`, and go on."""
    try:
        yield
    except (OutOfSpace, StoreUnavailable) as error:
        to.warning("%s: %s", otherwise, error.message)


class Database:
    """Transactions on the database."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction, committed at the end and rolled back on an error.

        Raises OutOfSpace when the disk is full and StoreUnavailable when the database cannot be used for another
        reason that passes; nothing was written then.
        """
        try:
            async with self._engine.begin() as connection:
                yield connection
        except (OperationalError, NoConnection) as error:
            why = str(error.orig) if isinstance(error, OperationalError) else "no connection to it is free"
            if "disk is full" in why or "disk I/O" in why:
                raise OutOfSpace(
                    "disk_full", "The server's disk is full; free space in the state directory and try again."
                ) from error
            log.warning("the database cannot be used: %s", why)
            raise StoreUnavailable(
                "database_unavailable", "The server's database cannot be used at the moment; try again.", 5
            ) from error


def _configure(connection: Any, _record: object) -> None:  # noqa: ANN401 - the driver's own connection type
    cursor = connection.cursor()
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", "busy_timeout = 5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Database]:
    """Migrate the database at `path`, open it, and close it at the end. Raises MigrationFailed."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    event.listen(engine.sync_engine, "connect", _configure)
    try:
        await _migrate(engine, path)
        yield Database(engine)
    finally:
        await engine.dispose()


async def _migrate(engine: AsyncEngine, path: Path) -> None:
    async with engine.connect() as connection:
        known = await connection.scalar(text("SELECT name FROM sqlite_master WHERE name = 'alembic_version'"))
        if known and await connection.scalar(text("SELECT version_num FROM alembic_version")) == SCHEMA:
            return
    # in a process of its own: Alembic and Mako would stay in this one's memory for good (9 MB)
    argv = (sys.executable, "-m", "blockyard_api.store.migrate", str(path))
    # killed, too, when this start is cancelled: the next one would find the database locked
    async with child.running(*argv, stderr=asyncio.subprocess.PIPE) as process:
        try:
            async with asyncio.timeout(MIGRATED_WITHIN):
                _, words = await process.communicate()
        except TimeoutError as error:
            raise MigrationFailed(
                "migration_slow",
                f"{path}: was not brought to schema {SCHEMA} within {MIGRATED_WITHIN:.0f} s and is as it was before; "
                "give the server a faster disk, or time to finish what else it does, and start again.",
            ) from error
    if process.returncode is not None and process.returncode < 0:  # this daemon is being stopped
        raise MigrationFailed(
            "migration_ended",
            f"{path}: was not brought to schema {SCHEMA}, since that was ended by signal {-process.returncode}; "
            "it is as it was before, and the next start tries again.",
        )
    if process.returncode:
        last = words.decode(errors="replace").strip().rpartition("\n")[2]
        raise MigrationFailed("migration_failed", f"{path}: cannot be brought to schema {SCHEMA}: {last}")
