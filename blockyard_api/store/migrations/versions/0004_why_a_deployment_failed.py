"""Why a bundle's deployment failed."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("bundles", sa.Column("reason", sa.Text(), nullable=True))


def downgrade() -> None:
    """Take back."""
    with op.batch_alter_table("bundles", schema=None) as batch_op:
        batch_op.drop_column("reason")
