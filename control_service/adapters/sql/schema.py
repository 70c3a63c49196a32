"""The tables, declared once; migrations bring a database to this shape and a contract test compares the two.

Names of states are stored, never their numbers. Nothing here is particular to SQLite.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_microseconds(value: datetime) -> int:
    """Whole microseconds since 1970 of an aware time."""
    since = value - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


class UtcMicroseconds(sa.types.TypeDecorator[datetime]):
    """An aware UTC time, kept as whole microseconds since 1970: exact, ordered, the same in every database."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> int | None:
        """To the database."""
        return None if value is None else to_microseconds(value)

    def process_result_value(self, value: int | None, dialect: Any) -> datetime | None:
        """From the database."""
        return None if value is None else _EPOCH + timedelta(microseconds=value)


# SQLite numbers rows by itself only for its plain INTEGER type.
_ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_JSON = sa.JSON(none_as_null=True)

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

projects = sa.Table(
    "projects",
    metadata,
    sa.Column("project_id", _ROW_ID, primary_key=True, autoincrement=True),
    sa.Column("name", sa.String(128), nullable=False, unique=True),
    sa.Column("draft", _JSON, nullable=False),
    sa.Column("create_time", UtcMicroseconds, nullable=False),
    sa.Column("update_time", UtcMicroseconds, nullable=False),
    sa.Column("etag", sa.String(64), nullable=False),
    sqlite_autoincrement=True,
)

datasets = sa.Table(
    "datasets",
    metadata,
    sa.Column("dataset_id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("name", sa.String(128), nullable=False, unique=True),
    sa.Column("sha256", sa.String(64), nullable=False, index=True),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("num_examples", sa.BigInteger, nullable=False),
    sa.Column("format", sa.String(64), nullable=False),
    sa.Column("create_time", UtcMicroseconds, nullable=False),
    # What was uploaded; the columns above are of the rows as JSON lines.
    sa.Column("file_format", sa.String(16), nullable=False, server_default="jsonl"),
    sa.Column("compression", sa.String(16), nullable=False, server_default=""),
    sa.Column("file_sha256", sa.String(64), nullable=False, server_default=""),
    sa.Column("file_size_bytes", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    # Null for datasets that were registered before there were statistics.
    sa.Column("statistics", _JSON, nullable=True),
    sqlite_autoincrement=True,
)

project_datasets = sa.Table(
    "project_datasets",
    metadata,
    sa.Column("project_id", _ROW_ID, sa.ForeignKey("projects.project_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("dataset_id", sa.Integer, sa.ForeignKey("datasets.dataset_id"), primary_key=True, index=True),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("job_id", sa.String(26), primary_key=True),
    # No foreign key: ended jobs outlive their project.
    sa.Column("project_id", sa.BigInteger, nullable=False),
    sa.Column("project_name", sa.String(128), nullable=False),
    sa.Column("spec", _JSON, nullable=False),
    sa.Column("spec_digest", sa.String(64), nullable=False),
    sa.Column("output_path", sa.Text, nullable=False),
    sa.Column("create_time", UtcMicroseconds, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("max_retries", sa.Integer, nullable=False),
    sa.Column("num_retries", sa.Integer, nullable=False),
    sa.Column("retry_of_job_id", sa.String(26), nullable=False),
    sa.Column("state", sa.String(32), nullable=False),
    sa.Column("phase", sa.String(32), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("node", sa.String(63), nullable=False),
    sa.Column("node_unreachable", sa.Boolean, nullable=False),
    sa.Column("progress", _JSON, nullable=False),
    sa.Column("failure", _JSON, nullable=True),
    sa.Column("weights_digest", sa.String(64), nullable=False),
    sa.Column("start_time", UtcMicroseconds, nullable=True),
    sa.Column("end_time", UtcMicroseconds, nullable=True),
    sa.Column("not_before", UtcMicroseconds, nullable=True),
    sa.Column("run_cursor", sa.BigInteger, nullable=False),
    sa.Column("run_state", sa.String(32), nullable=True),
    sa.Column("last_sequence", sa.BigInteger, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    # With the order of listings: a page is read, not everything that it is a page of.
    sa.Index(None, "project_id", "job_id"),
    sa.Index(None, "state", "job_id"),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("job_id", sa.String(26), sa.ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    # Null for events that control wrote; null is distinct from null in a unique key.
    sa.Column("run_sequence", sa.BigInteger, nullable=True),
    sa.Column("kind", sa.Integer, nullable=False),
    sa.Column("time", UtcMicroseconds, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("job_id", "attempt", "run_sequence"),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("job_id", sa.String(26), sa.ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("status", sa.String(32), nullable=False, index=True),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("manifest_sha256", sa.String(64), nullable=False),
    sa.Column("files", _JSON, nullable=False),
    sa.Column("node", sa.String(63), nullable=False),
    sa.Column("create_time", UtcMicroseconds, nullable=False),
    sa.Column("probe_loss", sa.Double),
    sa.Column("held_out_loss", sa.Double),
    sa.Column("best", sa.Boolean, nullable=False, server_default=sa.false()),
)

artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("job_id", sa.String(26), sa.ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("files", _JSON, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("create_time", UtcMicroseconds, nullable=False),
)

# Which record of a job holds which content, so that bytes are deleted with their last holder.
blob_references = sa.Table(
    "blob_references",
    metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("job_id", sa.String(26), sa.ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    # `artifact:adapter`, `checkpoint:step-00000020`; `start`: what the job itself starts from.
    sa.Column("holder", sa.String(160), primary_key=True, index=True),
    sa.Index(None, "job_id"),
)

nodes = sa.Table(
    "nodes",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("address", sa.String(255), nullable=False),
    sa.Column("draining", sa.Boolean, nullable=False),
    sa.Column("interrupt", sa.Boolean, nullable=False),
    sa.Column("configured", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("create_time", UtcMicroseconds, nullable=False),
)

requests = sa.Table(
    "requests",
    metadata,
    sa.Column("method", sa.String(128), primary_key=True),
    sa.Column("request_id", sa.String(64), primary_key=True),
    sa.Column("body_digest", sa.String(64), nullable=False),
    sa.Column("reference", sa.Text, nullable=False),
    sa.Column("create_time", UtcMicroseconds, nullable=False, index=True),
)
