"""What is kept of workers that ended."""

import time

from sqlalchemy import delete, select

from blockyard_api.store.database import Database
from blockyard_api.store.tables import sessions, workers
from blockyard_api.workers.life import State


async def prune(database: Database, retention: float) -> None:
    """Forget workers that ended `retention` seconds ago, as their logs are, unless a session still names one."""
    old = (workers.c.status == State.ENDED.value) & (workers.c.ended_at < time.time() - retention)
    async with database.begin() as connection:
        await connection.execute(delete(workers).where(old, workers.c.id.not_in(select(sessions.c.worker_id))))
