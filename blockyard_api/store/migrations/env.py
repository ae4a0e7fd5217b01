"""Alembic's environment: one SQLite database, and all that is migrated at once in one transaction."""

from typing import Any

from alembic import context
from sqlalchemy import Connection, create_engine, event

from blockyard_api.store.tables import metadata

engine = create_engine(context.config.get_main_option("sqlalchemy.url", ""))


@event.listens_for(engine, "connect")
def _leave_transactions_alone(driver: Any, _record: object) -> None:  # noqa: ANN401 - the driver's own connection type
    driver.isolation_level = None  # sqlite3 would begin one before the first change of a row, past that of tables


@event.listens_for(engine, "begin")
def _begin(connection: Connection) -> None:
    # at once for writing: a transaction that begins by reading fails, without a wait, once the old daemon has written
    connection.exec_driver_sql("BEGIN IMMEDIATE")


with engine.begin() as connection:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    context.run_migrations()
engine.dispose()
