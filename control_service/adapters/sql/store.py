"""The store over SQLAlchemy Core: one writer thread that commits in groups, readers on connections of their own."""

from __future__ import annotations

from pathlib import Path


class SqlStore:
    """Implements `app.store_ports.Store`."""

    @classmethod
    async def open(cls, database: Path) -> SqlStore:
        """Opens and migrates the SQLite database file. FailedPrecondition STORE_UNAVAILABLE when SQLite is too old."""
        raise NotImplementedError

    async def close(self) -> None:
        """Commits what waits, then ends the threads."""
