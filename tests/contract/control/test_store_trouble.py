"""The store between a database without room and connections that break: nobody is told what is not so, and it heals."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from control_service.adapters.sql.store import SqlStore
from control_service.app.store_ports import Transaction
from control_service.domain.errors import StoreFull, TunesmithError, Unavailable
from control_service.domain.node import Node

NUM_READERS = 4


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlStore]:
    opened = await SqlStore.open(tmp_path / "control.db")
    yield opened
    await opened.close()


def _node(name: str, *, address: str = "x:1") -> Node:
    return Node(name=name, address=address, create_time=datetime(2030, 1, 1, tzinfo=UTC))


def _connection_of(tx: Transaction) -> Any:
    return tx.jobs._connection  # type: ignore[attr-defined]


def _limit_pages(tx: Transaction, *, more: int) -> None:
    pages = _connection_of(tx).exec_driver_sql("PRAGMA page_count").scalar_one()
    _connection_of(tx).exec_driver_sql(f"PRAGMA max_page_count = {pages + more}")


async def test_a_group_in_which_a_change_finds_no_room_is_told_so_and_nothing_of_it_stays(store: SqlStore) -> None:
    await store.transact(lambda tx: _limit_pages(tx, more=0))
    begun, go_on = threading.Event(), threading.Event()

    def hold(tx: Transaction) -> None:
        begun.set()
        go_on.wait()

    holding = asyncio.create_task(store.transact(hold))
    await asyncio.to_thread(begun.wait)
    large = "x" * 100_000
    # One group, since the writer is held: SQLite undoes all of it where a statement finds no room.
    group = [
        asyncio.create_task(store.transact(lambda tx: tx.nodes.put(_node("before")))),
        asyncio.create_task(store.transact(lambda tx: tx.nodes.put(_node("large", address=large)))),
        asyncio.create_task(store.transact(lambda tx: tx.nodes.put(_node("after")))),
    ]
    await asyncio.sleep(0)
    go_on.set()
    await holding
    answers = await asyncio.gather(*group, return_exceptions=True)
    stored = {node.name for node in await store.read(lambda tx: tx.nodes.list_all())}
    names = ("before", "large", "after")
    told_ok = {name for name, answer in zip(names, answers, strict=True) if answer is None}
    assert told_ok == stored
    refusals = [answer for answer in answers if answer is not None]
    assert refusals
    assert all(isinstance(one, StoreFull) and one.reason == "DISK_FULL" for one in refusals), refusals
    assert store._was_full
    # There is room beside the database.
    await store.check_room()
    assert not store._was_full
    await store.transact(lambda tx: _limit_pages(tx, more=10_000))
    await store.transact(lambda tx: tx.nodes.put(_node("large", address=large)))
    assert await store.read(lambda tx: tx.nodes.get("large")) == _node("large", address=large)


class _Failing:
    """A connection whose next commit meets what no table of errors has; an injected fault is one."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._fails = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def exec_driver_sql(self, statement: str) -> Any:
        if statement == "COMMIT" and self._fails:
            self._fails = False
            raise OSError(5, "Input/output error")
        return self._connection.exec_driver_sql(statement)


async def test_whatever_a_commit_meets_the_writer_goes_on(store: SqlStore) -> None:
    store._connection = _Failing(store._connection)  # type: ignore[assignment]
    async with asyncio.timeout(30.0):
        with pytest.raises(Unavailable, match="Input/output error"):
            await store.transact(lambda tx: tx.nodes.put(_node("lost")))
        await store.transact(lambda tx: tx.nodes.put(_node("kept")))
    assert [node.name for node in await store.read(lambda tx: tx.nodes.list_all())] == ["kept"]


async def test_a_reader_whose_connection_broke_gets_another(store: SqlStore) -> None:
    await store.transact(lambda tx: tx.nodes.put(_node("n")))

    def break_it(tx: Transaction) -> None:
        _connection_of(tx).connection.dbapi_connection.close()
        tx.nodes.list_all()

    for _ in range(NUM_READERS):
        with pytest.raises(Unavailable, match="STORE_UNAVAILABLE"):
            await store.read(break_it)
    for _ in range(2 * NUM_READERS):
        assert await store.read(lambda tx: tx.nodes.get("n")) == _node("n")


async def test_a_listener_that_fails_keeps_no_writer_waiting(store: SqlStore) -> None:
    heard: list[str] = []

    def fail(_: object) -> None:
        raise TunesmithError("INTERNAL", "a defect")

    store.subscribe(fail)
    store.subscribe(lambda _: heard.append("second"))
    async with asyncio.timeout(10.0):
        await store.transact(lambda tx: tx.nodes.put(_node("n")))
    assert heard == ["second"]
