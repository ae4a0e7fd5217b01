"""Brings a database to the newest schema: ``python -m blockyard_api.store.migrate PATH``."""

import sys
from pathlib import Path

from alembic import command
from alembic.config import Config


def alembic_config(path: Path) -> Config:
    """Return Alembic's configuration for the database at `path`."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("sqlalchemy.url", f"sqlite:///{path}".replace("%", "%%"))
    return config


def upgrade(path: Path) -> None:
    """Bring the database at `path` to the newest schema."""
    command.upgrade(alembic_config(path), "head")


if __name__ == "__main__":
    upgrade(Path(sys.argv[1]))
