"""Views, and what is kept of the past: visitors are counted for ever, and the tables do not grow with them."""

import itertools
import sqlite3
import time

import pytest
from alembic import command
from sqlalchemy import func, insert, select, update
from test_deploy import over, upload

from blockyard_api.apps.catalog import Catalog
from blockyard_api.identity.tokens import Tokens, digest
from blockyard_api.sessions import views
from blockyard_api.sessions.views import HOUR, Views, fold
from blockyard_api.store import migrate, tables
from blockyard_api.store.tables import sessions
from blockyard_api.workers.records import Records

DAY = 86400.0
numbers = itertools.count()


@pytest.fixture
async def catalog(store):
    await Tokens(store).first_admin()
    return Catalog(store)


@pytest.fixture
async def app(catalog):
    return await catalog.create("plain", "admin")


async def begun(store, app, ages, **more):
    """Write down sessions, which are over: of each visitor's hash, how many seconds ago."""
    now = time.time()
    worker = {"app_id": app.id, "worker_id": "w", "last_seen_at": now, "ended_at": now}
    ages = [
        {"hash": str(next(numbers)), "visitor": who, "created_at": now - ago, **worker, **more} for who, ago in ages
    ]
    async with store.begin() as connection:
        await connection.execute(insert(sessions), ages)


async def size(store, table):
    async with store.begin() as connection:
        return await connection.scalar(select(func.count()).select_from(table))


async def test_what_was_counted_is_the_same_once_its_rows_are_gone(store, catalog, app):
    other = await catalog.create("other", "admin")
    await begun(store, app, [(digest(who), days * DAY + 3 * HOUR) for days, who in enumerate("abcabcabcd")])
    await begun(store, app, [(digest("e"), 60)], ended_at=None)
    await begun(store, other, [(digest("a"), 60)])
    before = await views.count(store, app.id)
    assert before == Views(total=11, recent=8, visitors=5)
    for _ in range(2):
        await fold(store)
        assert await views.count(store, app.id) == before
    assert await views.count(store, other.id) == Views(1, 1, 1)
    assert await size(store, sessions) == 1


async def test_views_that_are_long_ago_are_one_row_and_are_recent_no_more(store, app, clock):
    await begun(store, app, [(digest(str(hour)), hour * 3600) for hour in range(50)])
    await fold(store)
    await begun(store, app, [(digest("late"), 0)])
    await clock.advance(8 * DAY)
    await begun(store, app, [(digest("now"), 0)])
    await fold(store)
    assert await views.count(store, app.id) == Views(total=52, recent=1, visitors=52)
    assert await size(store, tables.views) == 2


async def test_more_visitors_than_are_kept_are_estimated_and_the_same_once_their_rows_are_gone(store, app):
    await begun(store, app, [(digest(str(number)), 0) for number in range(20_000)] * 2)
    before = await views.count(store, app.id)
    await fold(store)
    assert await views.count(store, app.id) == before
    assert 18_000 < before.visitors < 22_000
    assert await size(store, tables.visitors) == views.SAMPLE


async def test_visitors_who_choose_their_hashes_are_no_more_than_their_views(store, app):
    await begun(store, app, [(f"{number:064x}", 0) for number in range(2000)])
    assert (await views.count(store, app.id)).visitors == 2000


async def test_an_app_that_is_purged_leaves_no_counts(store, catalog, app):
    await begun(store, app, [(digest("a"), 0)])
    await fold(store)
    await catalog.delete(app)
    await catalog.purge(time.time() + 1)
    assert await size(store, tables.views) == await size(store, tables.visitors) == 0


async def test_the_daemon_folds_what_is_over_and_knows_users_by_a_hash_too(control, clock):
    store = control.services.database
    await control.app()
    _, token = await control.services.tokens.create("admin", "t")
    await control.visit()
    await control.visit(Authorization=b"Bearer " + token.encode())
    async with store.begin() as connection:
        assert digest("admin") in (await connection.scalars(select(sessions.c.visitor))).all()
    for _ in range(3):  # until they are idle, are saved as over, and are cleaned up
        await clock.advance(3700)
        await control.quiet()
    while await size(store, sessions):
        await control.quiet()
    assert await control.sessions.views(control.catalog.named("plain")) == Views(2, 2, 2)


async def test_workers_that_ended_are_forgotten_after_a_while_unless_a_session_names_one(store, app, clock):
    row = {"app_id": app.id, "bundle_id": "b", "started_at": 0, "ended_at": time.time(), "status": "ended"}
    rows = [row | {"id": name} for name in ("gone", "w")]
    rows += [row | {"id": "late", "ended_at": time.time() + 2 * DAY}, row | {"id": "runs", "status": "active"}]
    async with store.begin() as connection:
        await connection.execute(insert(tables.workers), rows)
    await begun(store, app, [(digest("a"), 0)], ended_at=None)
    await Records(store).prune(30 * DAY)
    assert await size(store, tables.workers) == 4
    await clock.advance(31 * DAY)
    await Records(store).prune(30 * DAY)
    async with store.begin() as connection:
        assert set(await connection.scalars(select(tables.workers.c.id))) == {"w", "late", "runs"}


async def test_the_daemon_forgets_workers_and_deployments_with_their_logs(control, clock):
    store = control.services.database
    app = await control.catalog.create("empty", "admin")
    for status in ("failed", "running"):
        _, task = await upload(control, app, {"README": "no app"})
        await over(control, task)
        async with store.begin() as connection:
            await connection.execute(update(tables.tasks).where(tables.tasks.c.id == task).values(status=status))
    await control.app()
    worker = control.worker_of(await control.visit())
    worker.end("idle")
    await worker.ended.wait()
    await clock.advance(29 * DAY)
    await control.quiet()
    assert await size(store, tables.tasks) == 2
    for _ in range(3):
        await clock.advance(DAY)
        await control.quiet()
    while await size(store, tables.tasks) == 2 or await size(store, tables.workers):
        await control.quiet()
    assert await size(store, tables.tasks) == 1


def test_users_visits_of_before_are_known_by_the_same_hash(tmp_path):
    path = tmp_path / "blockyard.db"
    command.upgrade(migrate.alembic_config(path), "0003")
    with sqlite3.connect(path) as connection:  # which minds no foreign keys
        for user, visitor in (("me", "me"), (None, "f" * 64)):
            connection.execute(
                "INSERT INTO sessions (hash, app_id, user_sub, visitor, worker_id, created_at, last_seen_at)"
                " VALUES (?, 'a', ?, ?, 'w', 0, 0)",
                (visitor, user, visitor),
            )
    migrate.upgrade(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT visitor FROM sessions").fetchall() == [(digest("me"),), ("f" * 64,)]
