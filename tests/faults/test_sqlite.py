"""SQLite is trusted to keep what it committed: the conditions of that trust, on the store's own connections."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from control_service.adapters.sql.store import DATABASE_NAME, SqlStore
from control_service.app.store_ports import Transaction

NUM_READS = 8
# FULL is 2; no memory map, so that a failing disk is an error and not SIGBUS.
EVERYWHERE = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 1_000, "mmap_size": 0}


def _pragmas(connection: Any) -> dict[str, Any]:
    names = (*EVERYWHERE, "query_only")
    return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in names}


async def _pragmas_of_readers(store: SqlStore) -> list[Mapping[str, Any]]:
    return await asyncio.gather(*(store.read(lambda tx: _pragmas(_connection_of(tx))) for _ in range(NUM_READS)))


def _connection_of(tx: Transaction) -> Any:
    return tx.jobs._connection  # type: ignore[attr-defined]


async def test_the_writers_and_the_readers_connections_are_as_the_promises_need_them(tmp_path: Path) -> None:
    store = await SqlStore.open(tmp_path / DATABASE_NAME)
    try:
        written = await store.transact(lambda tx: _pragmas(_connection_of(tx)))
        read = await _pragmas_of_readers(store)
        version = await store.transact(
            lambda tx: _connection_of(tx).exec_driver_sql("SELECT sqlite_version()").scalar_one()
        )
    finally:
        await store.close()
    assert written == EVERYWHERE | {"query_only": 0}
    assert read == [EVERYWHERE | {"query_only": 1}] * NUM_READS
    # Before it, two connections that write or checkpoint together can corrupt a WAL database.
    assert tuple(int(part) for part in version.split(".")) >= (3, 51, 3)


async def test_every_write_transaction_is_immediate_and_every_group_is_one_commit(tmp_path: Path) -> None:
    store = await SqlStore.open(tmp_path / DATABASE_NAME)
    said: list[str] = []
    try:
        await store.transact(lambda tx: _connection_of(tx).connection.dbapi_connection.set_trace_callback(said.append))
        said.clear()
        await asyncio.gather(*(store.transact(lambda tx: tx.jobs.get("none")) for _ in range(NUM_READS)))
    finally:
        await store.close()
    said = [statement.split(" ", 1)[0] if statement.startswith("SELECT") else statement for statement in said]
    assert set(said) == {"BEGIN IMMEDIATE", "SAVEPOINT work", "SELECT", "RELEASE work", "COMMIT"}
    begun, committed = said.count("BEGIN IMMEDIATE"), said.count("COMMIT")
    assert 1 <= begun == committed <= NUM_READS
    assert said.count("SAVEPOINT work") == said.count("RELEASE work") == NUM_READS
