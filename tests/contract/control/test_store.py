"""What the store promises: its schema, its pragmas, its transactions."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from control_service.adapters.sql import engine as sql_engine
from control_service.adapters.sql import schema
from control_service.adapters.sql.catalog_repositories import SqlDatasets
from control_service.adapters.sql.migrate import migrate
from control_service.adapters.sql.store import SqlStore
from control_service.app.store_ports import CommitNotice, Transaction
from control_service.domain.errors import Aborted, FailedPrecondition, Internal, Unavailable
from control_service.domain.event import EventKind, StoredEvent
from control_service.domain.job import Job
from control_service.domain.job_state import JobState
from control_service.domain.node import Node
from control_service.domain.run import RunState
from tests.fakes.control_jobs import JOB_ID, make_job

NOW = datetime(2030, 1, 1, 12, 30, 0, 123456, tzinfo=UTC)


def _job() -> Job:
    return make_job(create_time=NOW, state=JobState.RUNNING, attempt=1)


def _events(*run_sequences: int, kind: int = EventKind.STEP) -> list[StoredEvent]:
    return [
        StoredEvent(sequence=0, attempt=0, run_sequence=number, kind=kind, time=NOW, payload=bytes([number]))
        for number in run_sequences
    ]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlStore]:
    opened = await SqlStore.open(tmp_path / "control.db")
    yield opened
    await opened.close()


def test_migrations_lead_to_the_declared_schema(tmp_path: Path) -> None:
    engine = sql_engine.make_engine(tmp_path / "fresh.db")
    with sql_engine.connect(engine, read_only=False) as connection:
        migrate(connection)
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


def test_nodes_of_the_first_schema_are_kept_as_registered(tmp_path: Path) -> None:
    engine = sql_engine.make_engine(tmp_path / "old.db")
    with sql_engine.connect(engine, read_only=False) as connection:
        migrate(connection, revision="0001")
        connection.execute(
            sa.text(
                "INSERT INTO nodes (name, address, draining, interrupt, create_time) VALUES ('local', 'x:1', 1, 0, 5)"
            )
        )
        migrate(connection)
        row = connection.execute(sa.select(schema.nodes)).one()
        assert (row.name, row.draining, row.configured) == ("local", True, False)


def test_datasets_of_before_are_their_own_files_and_nothing_was_counted_of_them(tmp_path: Path) -> None:
    engine = sql_engine.make_engine(tmp_path / "old.db")
    with sql_engine.connect(engine, read_only=False) as connection:
        migrate(connection, revision="0002")
        connection.execute(
            sa.text(
                "INSERT INTO datasets (name, sha256, size_bytes, num_examples, format, create_time) "
                "VALUES ('rows', :sha256, 12, 3, 'text', 5)"
            ),
            {"sha256": "a" * 64},
        )
        migrate(connection)
        dataset = SqlDatasets(connection).get_by_name("rows")
        assert dataset is not None
        assert (dataset.file_format, dataset.compression, dataset.statistics) == ("jsonl", "", None)
        assert (dataset.file_sha256, dataset.file_size_bytes) == ("a" * 64, 12)


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    engine = sql_engine.make_engine(tmp_path / "newer.db")
    with sql_engine.connect(engine, read_only=False) as connection:
        migrate(connection)
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
        with pytest.raises(FailedPrecondition, match="newer version"):
            migrate(connection)


def test_a_sqlite_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sql_engine.sqlite_module().sqlite_version_info >= sql_engine.MIN_SQLITE_VERSION
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 2))
    monkeypatch.setattr(sql_engine, "MIN_SQLITE_VERSION", (99, 0, 0))
    with pytest.raises(FailedPrecondition, match="or newer is needed"):
        sql_engine.sqlite_module()


def test_commits_are_durable_and_readers_cannot_write(tmp_path: Path) -> None:
    engine = sql_engine.make_engine(tmp_path / "pragmas.db")
    with sql_engine.connect(engine, read_only=True) as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "query_only")
        }
        assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "query_only": 1}


async def test_an_exception_undoes_its_own_writes_and_reaches_its_caller(store: SqlStore) -> None:
    def fail(tx: Transaction) -> None:
        tx.jobs.insert(_job())
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await store.transact(fail)
    assert await store.read(lambda tx: tx.jobs.get(JOB_ID)) is None
    await store.transact(lambda tx: tx.jobs.insert(_job()))


async def test_a_job_survives_the_database_unchanged(store: SqlStore) -> None:
    await store.transact(lambda tx: tx.jobs.insert(_job()))
    assert await store.read(lambda tx: tx.jobs.get(JOB_ID)) == _job()


async def test_an_update_of_an_old_revision_is_refused(store: SqlStore) -> None:
    await store.transact(lambda tx: tx.jobs.insert(_job()))
    await store.transact(lambda tx: tx.jobs.update(_job()))
    with pytest.raises(Aborted):
        await store.transact(lambda tx: tx.jobs.update(_job()))


async def test_sequences_have_no_gap_and_run_events_are_stored_once(store: SqlStore) -> None:
    await store.transact(lambda tx: tx.jobs.insert(_job()))
    await store.transact(lambda tx: tx.events.append(JOB_ID, attempt=0, events=_events(0)))
    await store.transact(lambda tx: tx.events.append_run_events(JOB_ID, attempt=1, events=_events(1, 2)))
    fresh = await store.transact(lambda tx: tx.events.append_run_events(JOB_ID, attempt=1, events=_events(1, 2, 3)))
    assert [(event.sequence, event.run_sequence) for event in fresh] == [(4, 3)]
    page = await store.read(lambda tx: tx.events.page(JOB_ID, after_sequence=0, limit=100))
    assert [(e.sequence, e.run_sequence, e.attempt) for e in page] == [(1, 0, 0), (2, 1, 1), (3, 2, 1), (4, 3, 1)]
    assert page[3].payload == b"\x03"
    assert page[3].time == NOW
    with pytest.raises(Internal):
        await store.transact(lambda tx: tx.events.append_run_events(JOB_ID, attempt=1, events=_events(5)))
    with pytest.raises(FailedPrecondition, match="STALE_EPOCH"):
        await store.transact(lambda tx: tx.events.append_run_events(JOB_ID, attempt=0, events=_events(4)))


async def test_a_kind_that_is_not_known_is_stored_like_any_other(store: SqlStore) -> None:
    await store.transact(lambda tx: tx.jobs.insert(_job()))
    await store.transact(lambda tx: tx.events.append_run_events(JOB_ID, attempt=1, events=_events(1, kind=999)))
    page = await store.read(lambda tx: tx.events.page(JOB_ID, after_sequence=0, limit=1))
    assert page[0].kind == 999


async def test_listeners_hear_of_a_commit_before_its_writer(store: SqlStore) -> None:
    heard: list[CommitNotice] = []
    store.subscribe(heard.append)

    def work(tx: Transaction) -> None:
        tx.jobs.insert(_job())
        tx.events.append(JOB_ID, attempt=0, events=_events(0))

    await store.transact(work)
    assert heard == [
        CommitNotice(job_sequences={JOB_ID: 1}, jobs_changed=True, nodes_changed=False, moved_jobs=frozenset({JOB_ID}))
    ]
    # What is heard of can be read.
    assert (await store.read(lambda tx: tx.events.bounds(JOB_ID))) == (1, 1)


@pytest.mark.parametrize("unreachable", [True, False])
async def test_an_update_moves_a_job_whose_node_is_unreachable_and_no_other(store: SqlStore, unreachable: bool) -> None:
    job = replace(_job(), node_unreachable=unreachable)
    await store.transact(lambda tx: tx.jobs.insert(job))
    heard: list[CommitNotice] = []
    store.subscribe(heard.append)

    def work(tx: Transaction) -> None:
        tx.events.append(JOB_ID, attempt=0, events=_events(0))
        # What it came to is in the record, and in no event that moves a job.
        tx.jobs.update(replace(job, run_state=RunState.SUCCEEDED))

    await store.transact(work)
    moved = frozenset({JOB_ID} if unreachable else ())
    assert heard == [CommitNotice(job_sequences={JOB_ID: 1}, jobs_changed=False, nodes_changed=False, moved_jobs=moved)]


async def test_a_database_that_cannot_be_written_is_unavailable_and_heals(store: SqlStore, tmp_path: Path) -> None:
    module = sql_engine.sqlite_module()
    assert store._connection is not None
    store._connection.exec_driver_sql("PRAGMA busy_timeout = 1")
    other = module.connect(str(tmp_path / "control.db"))
    other.execute("BEGIN IMMEDIATE")
    node = Node(name="n", address="x:1", create_time=NOW)
    with pytest.raises(Unavailable) as refused:
        await store.transact(lambda tx: tx.nodes.put(node))
    assert refused.value.reason == "STORE_UNAVAILABLE"
    assert refused.value.retry_after_seconds
    other.rollback()
    other.close()
    await store.transact(lambda tx: tx.nodes.put(node))
    assert await store.read(lambda tx: tx.nodes.get("n")) == node


async def test_closing_commits_what_waits_and_then_refuses(tmp_path: Path) -> None:
    store = await SqlStore.open(tmp_path / "control.db")
    installation_id = store.installation_id

    def put(number: int) -> Callable[[Transaction], None]:
        return lambda tx: tx.nodes.put(Node(name=f"n{number}", address="x:1", create_time=NOW))

    writes = [asyncio.create_task(store.transact(put(number))) for number in range(20)]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*writes)
    with pytest.raises(Unavailable, match="closed"):
        await store.read(lambda tx: tx.nodes.list_all())
    again = await SqlStore.open(tmp_path / "control.db")
    assert again.installation_id == installation_id
    assert len(await again.read(lambda tx: tx.nodes.list_all())) == 20
    await again.close()


async def test_deleting_a_job_deletes_everything_of_it(store: SqlStore) -> None:
    await store.transact(lambda tx: tx.jobs.insert(_job()))
    await store.transact(lambda tx: tx.events.append(JOB_ID, attempt=0, events=_events(0)))
    await store.transact(lambda tx: tx.jobs.delete(JOB_ID))
    assert await store.read(lambda tx: tx.events.page(JOB_ID, after_sequence=0, limit=9)) == []


async def test_a_connection_that_cannot_be_rolled_back_is_replaced(store: SqlStore) -> None:
    node = Node(name="n", address="x:1", create_time=NOW)
    writer = store._connection
    assert writer is not None
    writer.connection.close()
    with pytest.raises(Unavailable, match="STORE_UNAVAILABLE"):
        await store.transact(lambda tx: tx.nodes.put(node))
    await store.transact(lambda tx: tx.nodes.put(node))
    assert store._connection is not writer
    assert await store.read(lambda tx: tx.nodes.get("n")) == node


async def test_a_database_that_is_locked_from_the_start_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("control_service.adapters.sql.store._OPEN_TIMEOUT_MILLISECONDS", 1)
    store = await SqlStore.open(tmp_path / "control.db")
    await store.close()
    other = sql_engine.sqlite_module().connect(str(tmp_path / "control.db"))
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="STORE_UNAVAILABLE"):
        await SqlStore.open(tmp_path / "control.db")
    other.close()
    await (await SqlStore.open(tmp_path / "control.db")).close()
