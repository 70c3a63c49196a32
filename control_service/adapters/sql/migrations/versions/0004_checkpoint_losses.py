"""Checkpoints with the losses that their events told. Those of before have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the columns."""
    op.add_column("checkpoints", sa.Column("probe_loss", sa.Double()))
    op.add_column("checkpoints", sa.Column("held_out_loss", sa.Double()))
    op.add_column("checkpoints", sa.Column("best", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    """Takes them away."""
    for name in ("best", "held_out_loss", "probe_loss"):
        op.drop_column("checkpoints", name)
