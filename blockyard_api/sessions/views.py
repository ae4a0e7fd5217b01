"""How often an app was opened, and by how many: sessions that are over become counts, so that no table grows for ever.

What is kept of an app is a row for each of the last hours, one for all before, and a sample of its visitors. The sample
is the smallest of their hashes: these lie evenly, so that where the last one lies tells how many there are in all.
"""

import time
from collections import Counter
from dataclasses import dataclass

from sqlalchemy import delete, func, select, union
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from blockyard_api.store.database import Database
from blockyard_api.store.tables import sessions, views, visitors

RECENT = 7 * 86400
HOUR = 3600
SAMPLE = 1024  # visitors of an app
_AT_ONCE = 1000  # sessions in one transaction: others want to write, too
_LONG_AGO = 0  # the hour of all that is not recent


@dataclass(frozen=True, slots=True)
class Views:
    """How often an app was opened. A view is one session: a visitor's browser and what it opens until it is idle.

    `recent` is exact to the hour. `visitors` counts, since the app was made, users by their name and others by their
    address and browser together; it is exact up to 1,024, and within some 3 % beyond.
    """

    total: int
    recent: int  # 7 days
    visitors: int


async def count(database: Database, app_id: str) -> Views:
    """Count an app's views."""
    since = time.time() - RECENT
    folded = select(
        func.coalesce(func.sum(views.c.number), 0),
        func.coalesce(func.sum(views.c.number).filter(views.c.hour > since - HOUR), 0),
    ).where(views.c.app_id == app_id)
    kept = select(func.count(), func.count().filter(sessions.c.created_at > since)).where(sessions.c.app_id == app_id)
    known = union(
        select(visitors.c.visitor).where(visitors.c.app_id == app_id),
        select(sessions.c.visitor).where(sessions.c.app_id == app_id),
    )
    smallest = known.order_by("visitor").limit(SAMPLE).subquery()
    async with database.begin() as connection:
        total, recent = (await connection.execute(folded)).one()
        more, more_recent = (await connection.execute(kept)).one()
        size, last = (await connection.execute(select(func.count(), func.max(smallest.c.visitor)))).one()
    total += more
    return Views(total, recent + more_recent, min(total, _in_all(size, last)))


def _in_all(size: int, last: str) -> int:
    return size if size < SAMPLE else round((SAMPLE - 1) * 16 ** len(last) / (int(last, 16) + 1))


async def fold(database: Database) -> None:
    """Count the sessions that are over, and delete them."""
    while await _fold_some(database):
        pass
    async with database.begin() as connection:
        old = delete(views).where(views.c.hour > _LONG_AGO, views.c.hour <= time.time() - RECENT - HOUR)
        numbers: Counter[tuple[str, int]] = Counter()
        for row in await connection.execute(old.returning(views.c.app_id, views.c.number)):
            numbers[row.app_id, _LONG_AGO] += row.number
        await _add(connection, numbers)


async def _fold_some(database: Database) -> bool:
    over = select(sessions.c.hash).where(sessions.c.ended_at.is_not(None)).limit(_AT_ONCE)
    gone = delete(sessions).where(sessions.c.hash.in_(over))
    async with database.begin() as connection:
        returned = await connection.execute(
            gone.returning(sessions.c.app_id, sessions.c.visitor, sessions.c.created_at)
        )
        rows = returned.all()
        await _add(connection, Counter((row.app_id, int(row.created_at // HOUR * HOUR)) for row in rows))
        if rows:
            seen = [{"app_id": row.app_id, "visitor": row.visitor} for row in rows]
            await connection.execute(insert(visitors).on_conflict_do_nothing(), seen)
        for app_id in {row.app_id for row in rows}:
            of_app = visitors.c.app_id == app_id
            smallest = select(visitors.c.visitor).where(of_app).order_by(visitors.c.visitor).limit(SAMPLE)
            await connection.execute(delete(visitors).where(of_app, visitors.c.visitor.not_in(smallest)))
    return len(rows) == _AT_ONCE


async def _add(connection: AsyncConnection, numbers: Counter[tuple[str, int]]) -> None:
    if numbers:
        statement = insert(views)
        sums = {"number": views.c.number + statement.excluded.number}
        rows = [{"app_id": app_id, "hour": hour, "number": number} for (app_id, hour), number in numbers.items()]
        await connection.execute(statement.on_conflict_do_update(index_elements=["app_id", "hour"], set_=sums), rows)
