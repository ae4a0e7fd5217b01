"""Alembic's environment: one SQLite database, one transaction a migration."""

from alembic import context
from sqlalchemy import create_engine

from blockyard_api.store.tables import metadata

engine = create_engine(context.config.get_main_option("sqlalchemy.url", ""))
with engine.begin() as connection:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    context.run_migrations()
engine.dispose()
