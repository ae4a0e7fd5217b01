"""The workers' rows in the database: what a restarted API finds them by, and what is kept of those that ended."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, delete, select, update
from sqlalchemy.dialects.sqlite import insert

from blockyard_api.store.database import Database, dispensable
from blockyard_api.store.tables import sessions
from blockyard_api.store.tables import workers as table
from blockyard_api.workers.life import State
from blockyard_api.workers.worker import Worker

_LOOKED_AT = 5000  # ended workers of one app
_AT_ONCE = 500  # rows that one statement names

log = logging.getLogger(__name__)


class Records:
    """The table of workers."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def write(self, worker: Worker) -> None:
        """Write a worker down as it is now; without the database only a restart would not find it."""
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
        with dispensable(log, f"worker {worker.id} is not recorded"):
            async with self._database.begin() as connection:
                await connection.execute(statement)

    async def alive(self) -> Sequence[Row[Any]]:
        """Return the rows of workers that are not known to have ended. Raises StoreUnavailable."""
        async with self._database.begin() as connection:
            return (await connection.execute(select(table).where(table.c.status != State.ENDED.value))).all()

    async def lost(self, names: Sequence[str]) -> None:
        """Note that workers ended while nobody looked. Raises StoreUnavailable."""
        ended = {
            "status": State.ENDED.value,
            "ended_at": time.time(),
            "end_reason": "ended while the server was away",
        }
        async with self._database.begin() as connection:
            for start in range(0, len(names), _AT_ONCE):
                some = table.c.id.in_(names[start : start + _AT_ONCE])
                await connection.execute(update(table).where(some).values(**ended))

    async def ended_of(self, app_id: str) -> list[str]:
        """Name an app's ended workers, the newest first. Raises StoreUnavailable."""
        ended = select(table.c.id).where(table.c.app_id == app_id, table.c.status == State.ENDED.value)
        async with self._database.begin() as connection:
            rows = await connection.execute(ended.order_by(table.c.ended_at.desc()).limit(_LOOKED_AT))
            return [row.id for row in rows]

    async def prune(self, retention: float) -> None:
        """Forget workers that ended `retention` seconds ago, as their logs are, unless a session still names one."""
        old = (table.c.status == State.ENDED.value) & (table.c.ended_at < time.time() - retention)
        async with self._database.begin() as connection:
            await connection.execute(delete(table).where(old, table.c.id.not_in(select(sessions.c.worker_id))))
