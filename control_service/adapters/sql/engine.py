"""Opens SQLite the one way this service uses it: WAL, full synchronous commits, foreign keys, a version without the
WAL-reset corruption. Every pragma is read back; a database that does not obey is refused."""

from __future__ import annotations

import importlib
import sqlite3
from pathlib import Path
from types import ModuleType

import sqlalchemy as sa

from control_service.domain.errors import FailedPrecondition

# Versions before this one can corrupt a WAL database when two connections write or checkpoint together.
MIN_SQLITE_VERSION = (3, 51, 3)
# How long a statement waits for another process' lock. Short: callers are told within their deadlines, and try again.
BUSY_TIMEOUT_MILLISECONDS = 1_000


def sqlite_module() -> ModuleType:
    """The interpreter's sqlite3 when it is new enough, else pysqlite3. FailedPrecondition when neither is."""
    if sqlite3.sqlite_version_info >= MIN_SQLITE_VERSION:
        return sqlite3
    found = f"sqlite3 {sqlite3.sqlite_version}"
    try:
        module = importlib.import_module("pysqlite3.dbapi2")
    except ImportError:
        found += ", no pysqlite3"
    else:
        if module.sqlite_version_info >= MIN_SQLITE_VERSION:
            return module
        found += f", pysqlite3 with {module.sqlite_version}"
    wanted = ".".join(str(part) for part in MIN_SQLITE_VERSION)
    raise FailedPrecondition("STORE_UNAVAILABLE", f"SQLite {wanted} or newer is needed; found {found}")


def make_engine(database: Path) -> sa.Engine:
    """An engine whose connections leave BEGIN and COMMIT to the store."""
    return sa.create_engine(
        sa.URL.create("sqlite", database=str(database)),
        module=sqlite_module(),
        poolclass=sa.pool.NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args={"check_same_thread": False},
    )


def connect(engine: sa.Engine, *, read_only: bool) -> sa.Connection:
    """A connection with every pragma set and read back."""
    connection = engine.connect()
    wanted: dict[str, int | str] = {
        "journal_mode": "wal",
        "synchronous": 2,  # FULL: an acknowledged commit survives a power loss
        "mmap_size": 0,  # a failing disk is an error of a call, not the death of the process
        "foreign_keys": 1,
        "busy_timeout": BUSY_TIMEOUT_MILLISECONDS,
        "query_only": 1 if read_only else 0,
    }
    for name, value in wanted.items():
        connection.exec_driver_sql(f"PRAGMA {name} = {value}")
        found = connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
        if found != value:
            connection.close()
            raise FailedPrecondition("STORE_UNAVAILABLE", f"SQLite has {name} {found!r} where {value!r} is needed")
    return connection
