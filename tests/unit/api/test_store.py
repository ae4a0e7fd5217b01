"""Migrations build what the tables say, and the database is a WAL one."""

import sqlite3

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text

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
