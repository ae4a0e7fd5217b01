"""Migrations build what the tables say, and the database is a WAL one."""

import hashlib
import sqlite3
import sys
import threading
import time
from contextlib import closing

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError

from blockyard_api.store import database, migrate, tables


def test_the_named_schema_is_the_newest_migration(tmp_path):
    scripts = ScriptDirectory.from_config(migrate.alembic_config(tmp_path / "any.db"))
    assert scripts.get_current_head() == database.SCHEMA


def test_migrations_build_exactly_the_tables_that_the_code_uses(tmp_path):
    path = tmp_path / "blockyard.db"
    migrate.upgrade(path)
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
    engine.dispose()


USERS = ["a", "b@example.org", "Zoë", "日本", "", "a\0b", "x" * 255]


@pytest.fixture
def visited(tmp_path):
    """A database of before views were counted, with two sessions of each user and one of a stranger."""
    path = tmp_path / "visited.db"
    command.upgrade(migrate.alembic_config(path), "0004")
    with closing(sqlite3.connect(path)) as connection, connection:
        for number, user in enumerate([*USERS, *USERS, None]):
            row = (str(number), "app", user, None, user or "a stranger's hash", "worker", 1.0, 2.0, None)
            connection.execute("INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    return path


def rows(path, query):
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def test_users_visits_are_kept_under_their_hash_and_a_strangers_as_they_are(visited):
    migrate.upgrade(visited)
    hashed = [hashlib.sha256(user.encode()).hexdigest() for user in USERS]
    kept = rows(visited, "SELECT visitor FROM sessions ORDER BY CAST(hash AS INTEGER)")
    assert kept == [(visitor,) for visitor in [*hashed, *hashed, "a stranger's hash"]]
    assert rows(visited, "SELECT DISTINCT typeof(visitor) FROM sessions") == [("text",)]


def test_as_many_users_as_sessions_are_hashed_in_one_pass(visited):
    with closing(sqlite3.connect(visited)) as connection, connection:
        many = ((f"more {number}", f"user {number}") for number in range(20_000))
        connection.executemany("INSERT INTO sessions VALUES (?, 'app', ?, NULL, '', 'worker', 1, 2, NULL)", many)
    before = time.process_time()
    migrate.upgrade(visited)
    assert time.process_time() - before < 10  # a pass for each user takes half a minute
    assert rows(visited, "SELECT count(*) FROM sessions WHERE length(visitor) <> 64") == [(1,)]


def test_a_migration_that_is_cut_off_leaves_the_database_as_it_was_and_succeeds_later(visited):
    broken = "CREATE TRIGGER broken BEFORE UPDATE ON sessions BEGIN SELECT raise(ABORT, 'cut off'); END"
    with closing(sqlite3.connect(visited)) as connection, connection:
        connection.execute(broken)
    tables_before = rows(visited, "SELECT name FROM sqlite_master")
    with pytest.raises(IntegrityError, match="cut off"):
        migrate.upgrade(visited)
    assert rows(visited, "SELECT name FROM sqlite_master") == tables_before
    with closing(sqlite3.connect(visited)) as connection, connection:
        connection.execute("DROP TRIGGER broken")
    migrate.upgrade(visited)
    assert rows(visited, "SELECT version_num FROM alembic_version") == [(database.SCHEMA,)]


async def test_a_migration_that_takes_too_long_is_ended_and_says_what_to_do(visited, monkeypatch):
    monkeypatch.setattr(database, "MIGRATED_WITHIN", 0.01)
    with pytest.raises(database.MigrationFailed, match="as it was before; give the server"):
        async with database.opened(visited):
            pass
    assert rows(visited, "SELECT version_num FROM alembic_version") == [("0004",)]


@pytest.fixture
def written_to(visited):
    """A daemon of the version before, which is in the middle of a write and ends it half a second later."""
    with closing(sqlite3.connect(visited, isolation_level=None, check_same_thread=False)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE sessions SET last_seen_at = 3")
        ending = threading.Timer(0.5, other.execute, ["COMMIT"])
        ending.start()
        yield visited
        ending.join()


def test_a_migration_waits_for_what_the_daemon_still_writes(written_to):
    migrate.upgrade(written_to)
    assert rows(written_to, "SELECT DISTINCT last_seen_at FROM sessions") == [(3.0,)]


async def test_a_migration_that_a_stop_of_the_service_ends_is_told_as_that(visited, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -TERM $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(database.MigrationFailed, match="ended by signal 15; it is as it was before"):
        async with database.opened(visited):
            pass


async def test_the_database_is_write_ahead_logged_and_minds_foreign_keys(store):
    async with store.begin() as connection:
        assert await connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert await connection.scalar(text("PRAGMA foreign_keys")) == 1


async def test_opening_a_second_time_migrates_nothing(tmp_path):
    for _ in range(2):
        async with database.opened(tmp_path / "blockyard.db"):
            pass
    with sqlite3.connect(tmp_path / "blockyard.db") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(database.SCHEMA,)]
