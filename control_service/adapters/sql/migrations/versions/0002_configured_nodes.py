"""Tells nodes that came from the settings from those that were registered. Nodes of before count as registered."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the column."""
    op.add_column("nodes", sa.Column("configured", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    """Takes it away."""
    op.drop_column("nodes", "configured")
