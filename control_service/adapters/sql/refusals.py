"""What the database's own errors are to a caller of the store."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from control_service.domain.errors import StoreFull, Unavailable

# What the database itself says; any other error of SQLAlchemy's is a defect of ours.
BROKEN: Final = (sa.exc.DBAPIError, sa.exc.PendingRollbackError)
# SQLite's result code.
_SQLITE_FULL: Final = 13
_FULL_RETRY_SECONDS: Final = 10.0


def unavailable(error: BaseException) -> Unavailable:
    """STORE_UNAVAILABLE, or DISK_FULL where that is what the database says."""
    if getattr(getattr(error, "orig", None), "sqlite_errorcode", None) == _SQLITE_FULL:
        return full()
    return Unavailable("STORE_UNAVAILABLE", f"the database cannot be used just now: {error}", retry_after_seconds=1.0)


def full() -> StoreFull:
    """DISK_FULL."""
    return StoreFull("DISK_FULL", "the database's disk is full", retry_after_seconds=_FULL_RETRY_SECONDS)
