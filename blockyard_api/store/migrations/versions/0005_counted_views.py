"""Views and visitors of sessions that are over, counted; a user's visits are kept under a hash, as a stranger's are."""

import hashlib
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "views",
        sa.Column("app_id", sa.String(length=36), nullable=False),
        sa.Column("hour", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["app_id"], ["apps.id"], name=op.f("fk_views_app_id_apps"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("app_id", "hour", name=op.f("pk_views")),
    )
    op.create_table(
        "visitors",
        sa.Column("app_id", sa.String(length=36), nullable=False),
        sa.Column("visitor", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["app_id"], ["apps.id"], name=op.f("fk_visitors_app_id_apps"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("app_id", "visitor", name=op.f("pk_visitors")),
    )
    # In one pass: there is no index of users, and there may be as many as sessions.
    driver: Any = op.get_bind().connection.driver_connection
    driver.create_function("sha256hex", 1, _sha256hex, deterministic=True)
    op.execute("UPDATE sessions SET visitor = sha256hex(user_sub) WHERE user_sub IS NOT NULL")


def _sha256hex(user: str) -> str:
    return hashlib.sha256(user.encode()).hexdigest()


def downgrade() -> None:
    """Take back."""
    op.drop_table("visitors")
    op.drop_table("views")
