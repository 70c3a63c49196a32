"""What keeps a late answer, an old decision or a second writer from changing a job, on the real store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from control_service.adapters.clock import SystemClock
from control_service.adapters.sql import engine as sql_engine
from control_service.adapters.sql import schema
from control_service.adapters.sql.records import event_to_driver, job_to_row
from control_service.adapters.sql.statements import insert_events
from control_service.adapters.sql.store import SqlStore
from control_service.app.attempts import AttemptStarter
from control_service.app.idempotency import RequestKey, once
from control_service.app.ingest import ingest
from control_service.app.settle import Settler
from control_service.app.store_ports import RequestRecord, Transaction
from control_service.domain.errors import FailedPrecondition
from control_service.domain.event import EventKind, StoredEvent
from control_service.domain.job import Job
from control_service.domain.job_state import JobState
from control_service.domain.reconcile import Settle
from tests.fakes.control_blobs import MemoryBlobStore
from tests.fakes.control_codec import PickleCodec
from tests.fakes.control_jobs import JOB_ID, NOW, make_job


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlStore]:
    opened = await SqlStore.open(tmp_path / "control.db")
    yield opened
    await opened.close()


async def keep(store: SqlStore, **changes: Any) -> Job:
    job = make_job(create_time=NOW, **changes)
    await store.transact(lambda tx: tx.jobs.insert(job))
    return job


async def stored(store: SqlStore) -> Job:
    job = await store.read(lambda tx: tx.jobs.get(JOB_ID))
    assert job is not None
    return job


def make_settler(store: SqlStore) -> Settler:
    return Settler(store=store, blobs=MemoryBlobStore(), codec=PickleCodec(), clock=SystemClock())


@pytest.mark.parametrize("seen", [{"attempt": 1}, {"state": JobState.PAUSING}])
async def test_a_decision_about_what_a_job_was_moves_nothing(store: SqlStore, seen: dict[str, Any]) -> None:
    job = await keep(store, state=JobState.RUNNING, attempt=2, node="a")
    await make_settler(store).settle(replace(job, **seen), Settle(state=JobState.FAILED, message="of then"))
    assert (await stored(store)).state is JobState.RUNNING
    await make_settler(store).settle(job, Settle(state=JobState.FAILED, message="of now"))
    assert (await stored(store)).state is JobState.FAILED


async def test_an_answer_to_an_older_attempt_makes_nothing_running(store: SqlStore) -> None:
    job = await keep(store, state=JobState.DISPATCHING, attempt=2, node="a")
    nobody: Any = None
    starter = AttemptStarter(
        store=store,
        nodes=nobody,
        blobs=MemoryBlobStore(),
        codec=PickleCodec(),
        clock=SystemClock(),
        settler=make_settler(store),
    )
    await starter.mark_running(replace(job, attempt=1), None)
    assert (await stored(store)).state is JobState.DISPATCHING
    await starter.mark_running(job, None)
    assert (await stored(store)).state is JobState.RUNNING


def step_of_a_run(run_sequence: int) -> StoredEvent:
    return StoredEvent(
        sequence=0, attempt=1, run_sequence=run_sequence, kind=EventKind.STEP, time=NOW, payload=b"\x80\x04N."
    )


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.CANCELLED, JobState.QUEUED])
async def test_a_job_that_is_on_no_node_takes_no_event_of_a_run(store: SqlStore, state: JobState) -> None:
    await keep(store, state=state, attempt=1)
    with pytest.raises(FailedPrecondition, match="STALE_EPOCH"):
        await ingest(JOB_ID, 1, [step_of_a_run(1)], store=store, codec=PickleCodec())
    assert await store.read(lambda tx: tx.events.page(JOB_ID, after_sequence=0, limit=9)) == []


async def test_a_request_is_known_for_seven_days(store: SqlStore) -> None:
    done: list[str] = []

    async def call(request_id: str, days: float) -> str:
        request = RequestKey(method="m", request_id=request_id, body_digest="b")

        def do() -> tuple[str, str]:
            done.append(request_id)
            return request_id, "new"

        def work(tx: Transaction) -> str:
            now = NOW + timedelta(days=days)
            return once(tx, request, now, work=do, replay=lambda reference: f"again {reference}")

        return await store.transact(work)

    assert await call("a", 0.0) == "new"
    assert await call("b", 6.9) == "new"
    assert await call("a", 6.9) == "again a"
    assert await call("c", 7.1) == "new"
    # Longer than that it need not be known, and the table does not grow for ever.
    assert await call("a", 7.2) == "new"
    assert done == ["a", "b", "c", "a"]


async def test_a_request_has_one_row(store: SqlStore) -> None:
    record = RequestRecord(method="m", request_id="r", body_digest="b", reference="x", create_time=NOW)
    await store.transact(lambda tx: tx.requests.put(record))
    with pytest.raises(sa.exc.IntegrityError):
        await store.transact(lambda tx: tx.requests.put(replace(record, reference="y")))


async def test_an_event_of_a_run_has_one_row(tmp_path: Path) -> None:
    """Even for a writer that does not look at the cursor."""
    store = await SqlStore.open(tmp_path / "keys.db")
    await store.close()
    engine = sql_engine.make_engine(tmp_path / "keys.db")
    with sql_engine.connect(engine, read_only=False) as connection:
        connection.execute(sa.insert(schema.jobs).values(**job_to_row(make_job(create_time=NOW)), last_sequence=0))
        event = step_of_a_run(1)
        insert = insert_events(1, connection.dialect)
        connection.exec_driver_sql(insert, event_to_driver(JOB_ID, replace(event, sequence=1)))
        with pytest.raises(sa.exc.IntegrityError):
            connection.exec_driver_sql(insert, event_to_driver(JOB_ID, replace(event, sequence=2)))
