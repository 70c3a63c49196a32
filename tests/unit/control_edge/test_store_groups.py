"""Groups of the store: what is gathered, and that the event loop steps aside for no longer than a moment."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from control_service.adapters.sql import readers
from control_service.adapters.sql.groups import Work, WriteGroup
from control_service.adapters.sql.store import SqlStore
from control_service.domain.errors import Unavailable


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlStore]:
    opened = await SqlStore.open(tmp_path / "control.db")
    yield opened
    await opened.close()


async def test_the_loop_goes_on_beside_functions_that_take_long(store: SqlStore) -> None:
    begun, go_on = threading.Barrier(3), threading.Event()

    def hold(_: object) -> bool:
        begun.wait(30.0)
        return go_on.wait(30.0)

    held = [asyncio.create_task(store.transact(hold)), asyncio.create_task(store.read(hold))]
    await asyncio.to_thread(begun.wait, 30.0)
    # It would not come before they have ended if the loop waited for them.
    assert await store.read(lambda _: go_on.is_set()) is False
    go_on.set()
    assert await asyncio.gather(*held) == [True, True]


def _give(number: int, _: object) -> int:
    return number


async def test_writes_that_come_together_are_one_commit(store: SqlStore) -> None:
    before = store.num_commits
    async with asyncio.timeout(30.0):
        assert await asyncio.gather(*(store.transact(partial(_give, number)) for number in range(100))) == [*range(100)]
    assert store.num_commits == before + 1


async def test_writes_that_come_during_a_group_are_the_next_one(store: SqlStore) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        begun.set()
        go_on.wait(30.0)

    before = store.num_commits
    holding = asyncio.create_task(store.transact(hold))
    await asyncio.to_thread(begun.wait, 30.0)
    following = [asyncio.create_task(store.transact(partial(_give, number))) for number in range(10)]
    await asyncio.sleep(0)
    go_on.set()
    async with asyncio.timeout(30.0):
        await holding
        assert await asyncio.gather(*following) == [*range(10)]
    assert store.num_commits == before + 2


async def test_one_who_reads_alone_waits_for_no_others(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_PATIENCE_SECONDS", 3600.0)
    async with asyncio.timeout(30.0):
        for number in range(10):
            assert await store.read(partial(_give, number)) == number


@pytest.mark.parametrize("patience_seconds", [0.0, 3600.0])
async def test_what_is_asked_for_while_one_reads_waits_for_it_for_a_while(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch, patience_seconds: float
) -> None:
    monkeypatch.setattr(readers, "_PATIENCE_SECONDS", patience_seconds)
    begun, go_on, threads = threading.Event(), threading.Event(), set()

    def hold(_: object) -> None:
        threads.add(threading.get_ident())
        begun.set()
        go_on.wait(30.0)

    async with asyncio.timeout(60.0):
        holding = asyncio.create_task(store.read(hold))
        await asyncio.to_thread(begun.wait, 30.0)
        waiting = [asyncio.create_task(store.read(lambda _: threads.add(threading.get_ident()))) for _ in range(20)]
        if patience_seconds:
            # As long as another group of writes takes, and what it takes to begin one of reads.
            await store.transact(lambda _: None)
            assert not any(task.done() for task in waiting)
        else:
            await asyncio.gather(*waiting)
        go_on.set()
        await asyncio.gather(holding, *waiting)
    assert (len(threads) > 1) == (patience_seconds == 0.0)


async def test_the_first_reader_to_be_done_goes_on_with_what_waited_for_all_of_them(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = [threading.Event() for _ in range(4)], [threading.Event() for _ in range(4)]

    def hold(number: int, _: object) -> bool:
        begun[number].set()
        return go_on[number].wait(60.0)

    holding = []
    async with asyncio.timeout(60.0):
        for number in range(4):
            holding.append(asyncio.create_task(store.read(partial(hold, number))))
            assert await asyncio.to_thread(begun[number].wait, 30.0)
        waiting = asyncio.create_task(store.read(partial(_give, 1)))
        await asyncio.sleep(0)
        while store._readers._sending is not None:  # noqa: ASYNC110 - nothing tells of a patience that is over
            await asyncio.sleep(0.001)
        monkeypatch.setattr(readers, "_PATIENCE_SECONDS", 3600.0)
        go_on[0].set()
        assert await waiting == 1
        for event in go_on:
            event.set()
        assert await asyncio.gather(*holding) == [True] * 4


async def test_whatever_a_reader_meets_it_goes_on(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(readers, "connect", lambda *_, **__: 1 // 0)
        with pytest.raises(Unavailable, match="division"):
            await store.read(partial(_give, 1))
    async with asyncio.timeout(30.0):
        assert await store.read(partial(_give, 2)) == 2


async def test_closing_answers_what_waits(tmp_path: Path) -> None:
    store = await SqlStore.open(tmp_path / "other.db")
    begun, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> str:
        begun.set()
        go_on.wait(30.0)
        return "held"

    tasks = [asyncio.create_task(store.transact(hold))]
    await asyncio.to_thread(begun.wait, 30.0)
    tasks += [asyncio.create_task(store.transact(lambda _: "written")) for _ in range(3)]
    tasks += [asyncio.create_task(store.read(lambda _: "read")) for _ in range(3)]
    await asyncio.sleep(0)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    go_on.set()
    async with asyncio.timeout(30.0):
        await closing
        assert await asyncio.gather(*tasks) == ["held", *["written"] * 3, *["read"] * 3]


async def test_a_failure_of_one_write_is_its_own(store: SqlStore) -> None:
    def fail(_: object) -> None:
        raise LookupError("mine")

    answers = await asyncio.gather(
        store.transact(lambda _: 1), store.transact(fail), store.transact(lambda _: 3), return_exceptions=True
    )
    assert answers[0] == 1
    assert isinstance(answers[1], LookupError)
    assert answers[2] == 3


async def test_a_group_that_has_run_keeps_nobody() -> None:
    group = WriteGroup([Work(function=lambda _: None, answer=asyncio.get_running_loop().create_future())])
    group.have_run()
    group.have_run()
    group.step_aside(3600.0)
    group.tell()
    assert group.works[0].answer.result() is None
