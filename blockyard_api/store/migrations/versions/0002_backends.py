"""Which backend an app wants, and which one a worker has."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("apps", sa.Column("backend", sa.String(length=16), nullable=True))
    op.add_column("workers", sa.Column("backend", sa.String(length=16), server_default="process", nullable=False))


def downgrade() -> None:
    """Take back."""
    with op.batch_alter_table("workers", schema=None) as batch_op:
        batch_op.drop_column("backend")
    with op.batch_alter_table("apps", schema=None) as batch_op:
        batch_op.drop_column("backend")
