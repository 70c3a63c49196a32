"""Reads control's database as it lies there: a copy is opened, so that nothing of the evidence is changed."""

from __future__ import annotations

import importlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_NAME = "control.sqlite"
_JSON_COLUMNS = frozenset({"spec", "draft", "progress", "failure", "files", "statistics"})
# WAL databases are read with a version that has the fix of the WAL-reset corruption, where there is one.
_MIN_VERSION = (3, 51, 3)

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Database:
    """Every row that the checks look at, as plain values; JSON columns are decoded."""

    integrity: str
    installation_id: str
    jobs: Mapping[str, Row]
    projects: Mapping[int, Row]
    datasets: Mapping[int, Row]
    # By (method, request id).
    requests: Mapping[tuple[str, str], Row]
    # In sequence, by job.
    events: Mapping[str, list[Row]]
    checkpoints: tuple[Row, ...]
    artifacts: tuple[Row, ...]


def read_database(control_directory: Path) -> Database:
    """Reads a copy of the database, its write-ahead log with it. Control must not be running. Raises OSError."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in control_directory.glob(f"{_NAME}*"):
            # The shared-memory index is made anew from the log.
            if not path.name.endswith("-shm"):
                shutil.copyfile(path, Path(scratch) / path.name)
        sqlite = _sqlite()
        with closing(sqlite.connect(Path(scratch) / _NAME)) as connection:
            connection.row_factory = sqlite.Row
            return _read(connection)


def _sqlite() -> ModuleType:
    if sqlite3.sqlite_version_info >= _MIN_VERSION:
        return sqlite3
    return importlib.import_module("pysqlite3.dbapi2")


def _read(connection: Any) -> Database:
    def rows(table: str, order: str) -> list[Row]:
        found = connection.execute(f"SELECT * FROM {table} ORDER BY {order}").fetchall()
        return [{key: _decoded(key, row[key]) for key in row.keys()} for row in found]  # noqa: SIM118 - no mapping

    events: dict[str, list[Row]] = {}
    for row in rows("events", "job_id, sequence"):
        events.setdefault(row["job_id"], []).append(row)
    meta = {row["key"]: row["value"] for row in rows("meta", "key")}
    return Database(
        integrity=connection.execute("PRAGMA integrity_check").fetchone()[0],
        installation_id=meta["installation_id"],
        jobs={row["job_id"]: row for row in rows("jobs", "job_id")},
        projects={row["project_id"]: row for row in rows("projects", "project_id")},
        datasets={row["dataset_id"]: row for row in rows("datasets", "dataset_id")},
        requests={(row["method"], row["request_id"]): row for row in rows("requests", "method, request_id")},
        events=events,
        checkpoints=tuple(rows("checkpoints", "job_id, step, name")),
        artifacts=tuple(rows("artifacts", "job_id, name")),
    )


def _decoded(key: str, value: Any) -> Any:
    return json.loads(value) if key in _JSON_COLUMNS and value is not None else value
