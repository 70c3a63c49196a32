"""Tells what was uploaded from the rows that are kept of it, and keeps statistics. Datasets of before were JSON lines
and are their own files; nothing was counted of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_SIZE = sa.text("0")


def upgrade() -> None:
    """Adds the columns and says what earlier datasets came from."""
    op.add_column("datasets", sa.Column("file_format", sa.String(16), nullable=False, server_default="jsonl"))
    op.add_column("datasets", sa.Column("compression", sa.String(16), nullable=False, server_default=""))
    op.add_column("datasets", sa.Column("file_sha256", sa.String(64), nullable=False, server_default=""))
    op.add_column("datasets", sa.Column("file_size_bytes", sa.BigInteger(), nullable=False, server_default=_SIZE))
    op.add_column("datasets", sa.Column("statistics", sa.JSON(none_as_null=True), nullable=True))
    names = ("sha256", "size_bytes", "file_sha256", "file_size_bytes")
    datasets = sa.table("datasets", *(sa.column(name) for name in names))
    op.execute(sa.update(datasets).values(file_sha256=datasets.c.sha256, file_size_bytes=datasets.c.size_bytes))


def downgrade() -> None:
    """Takes them away."""
    for name in ("statistics", "file_size_bytes", "file_sha256", "compression", "file_format"):
        op.drop_column("datasets", name)
