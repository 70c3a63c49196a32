"""The store over SQLAlchemy Core: one writer thread that commits in groups, and beside it readers (`readers`).

While one group of writes is under way, those that come wait, and are then the next group: the writer runs each in a
savepoint of one BEGIN IMMEDIATE, commits once, and then answers all. It never retries a function and never commits half
of one. Whatever the database does, the thread goes on: a connection that cannot be rolled back is replaced.
"""

from __future__ import annotations

import asyncio
import queue
import secrets
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa

from control_service.adapters.sql import room, schema
from control_service.adapters.sql.engine import BUSY_TIMEOUT_MILLISECONDS, connect, make_engine
from control_service.adapters.sql.groups import Work, WriteGroup
from control_service.adapters.sql.migrate import migrate
from control_service.adapters.sql.prepared import Prepared
from control_service.adapters.sql.readers import Readers
from control_service.adapters.sql.refusals import full, unavailable
from control_service.adapters.sql.touched import Touched
from control_service.adapters.sql.transaction import SqlTransaction
from control_service.app.store_ports import CommitNotice, Transaction
from control_service.domain.errors import StoreFull, Unavailable
from control_service.domain.failpoints import failpoint

T = TypeVar("T")

# The file's name in control's data directory.
DATABASE_NAME = "control.sqlite"
_MAX_GROUP = 256
# A group of writes is sent when a turn of the loop has brought no more of them, but not later than that.
_WRITE_PATIENCE_SECONDS = 0.005
# How long the loop steps aside for each function of a group of writes: as short ones take. What takes longer is the
# database's own work, during which the loop has the interpreter. Reads go beside it: with a pause for them there are
# fewer a second.
_WRITE_ASIDE_SECONDS = 0.0002
# Nobody minds a loop that is that late.
_MOST_ASIDE_SECONDS = 0.01
# Nobody waits for an answer yet when the database is opened, and a failure would end the service.
_OPEN_TIMEOUT_MILLISECONDS = 30_000
_BEGIN_WRITE = Prepared(sa.text("BEGIN IMMEDIATE"))
_SAVEPOINT, _RELEASE = Prepared(sa.text("SAVEPOINT work")), Prepared(sa.text("RELEASE work"))


class SqlStore:
    """Implements `app.store_ports.Store`."""

    def __init__(self, engine: sa.Engine, writer: sa.Connection, installation_id: str) -> None:
        self._engine = engine
        # None: the last one could not be rolled back.
        self._connection: sa.Connection | None = writer
        self._installation_id = installation_id
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Callable[[CommitNotice], None]] = []
        self._closed = False
        # A commit found no room, and nobody has found any since.
        self._was_full = False
        self.num_commits = 0
        self._to_write: queue.SimpleQueue[WriteGroup | None] = queue.SimpleQueue()
        self._writes: list[Work] = []
        # A group is being gathered or is under way.
        self._is_writing = False
        self._readers = Readers(engine)
        self._writer = threading.Thread(target=self._write_groups, name="store-writer")
        self._writer.start()

    @classmethod
    async def open(cls, database: Path) -> SqlStore:
        """Opens and migrates the SQLite database file. FailedPrecondition STORE_UNAVAILABLE when SQLite is too old, or
        a newer version of this service made the database; Unavailable STORE_UNAVAILABLE when it cannot be written."""
        try:
            engine, writer, installation_id = await asyncio.to_thread(_open, database)
        except sa.exc.OperationalError as error:
            raise unavailable(error) from error
        return cls(engine, writer, installation_id)

    @property
    def installation_id(self) -> str:
        """A random id made with the database."""
        return self._installation_id

    async def close(self) -> None:
        """Commits what waits, then ends the threads."""
        if self._closed:
            return
        self._closed = True
        for start in range(0, len(self._writes), _MAX_GROUP):
            self._to_write.put(WriteGroup(self._writes[start : start + _MAX_GROUP]))
        self._writes.clear()
        self._readers.stop()
        self._to_write.put(None)
        await asyncio.to_thread(self._end)

    def subscribe(self, listener: Callable[[CommitNotice], None]) -> None:
        """See the port."""
        self._listeners.append(listener)

    async def transact(self, work: Callable[[Transaction], T]) -> T:
        """See the port."""
        self._refuse_if_closed()
        answer: asyncio.Future[T] = self._loop.create_future()
        self._writes.append(Work(function=work, answer=answer))
        if not self._is_writing:
            self._is_writing = True
            self._gather_writes()
        return await answer

    def _gather_writes(self) -> None:
        self._loop.call_soon(self._send_writes, len(self._writes), self._loop.time() + _WRITE_PATIENCE_SECONDS)

    def _go_on_writing(self) -> None:
        self._is_writing = bool(self._writes)
        if self._is_writing:
            self._gather_writes()

    def _send_writes(self, num_before: int, until: float) -> None:
        """Sends a group, unless more came in the loop's last turn than there were before it."""
        num_writes = len(self._writes)
        if num_before < num_writes < _MAX_GROUP and self._loop.time() < until:
            self._loop.call_soon(self._send_writes, num_writes, until)
        elif num_writes:
            group = WriteGroup(self._writes[:_MAX_GROUP])
            del self._writes[:_MAX_GROUP]
            self._to_write.put(group)
            group.step_aside(min(_WRITE_ASIDE_SECONDS * len(group.works), _MOST_ASIDE_SECONDS))

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """See the port."""
        self._refuse_if_closed()
        return await self._readers.read(work)

    async def check_room(self) -> None:
        """See the port."""
        self._refuse_if_closed()
        await asyncio.to_thread(self._check_room)

    def _check_room(self) -> None:
        directory = Path(str(self._engine.url.database)).parent
        if self._was_full or room.is_short(directory):
            if not room.can_be_written(directory):
                raise full()
            self._was_full = False

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Unavailable("STORE_UNAVAILABLE", "the store is closed", retry_after_seconds=1.0)

    # In the writer thread.

    def _write_groups(self) -> None:
        while (group := self._to_write.get()) is not None:
            touched = self._commit_group(group)
            self._loop.call_soon_threadsafe(self._answer, group, touched)

    def _commit_group(self, group: WriteGroup) -> Touched:
        touched = Touched()
        is_committed = False
        try:
            if self._connection is None:
                self._connection = connect(self._engine, read_only=False)
            _BEGIN_WRITE.run(self._connection, {})
            self._run_in_savepoints(self._connection, group, touched)
            group.have_run()
            failpoint("store.before-commit")
            self._connection.exec_driver_sql("COMMIT")
            self.num_commits += 1
            is_committed = True
            failpoint("store.after-commit")
        except Exception as error:  # noqa: BLE001 - a thread's boundary: told to all who wait, and the thread goes on
            group.have_run()
            if not is_committed:
                self._roll_back()
                touched = Touched()
            # A statement without room makes SQLite undo the whole transaction: then it is the savepoint that is missed.
            is_full = any(isinstance(work.error, StoreFull) for work in group.works)
            for work in group.works:
                work.error = full() if is_full else unavailable(error)
        self._was_full |= any(isinstance(work.error, StoreFull) for work in group.works)
        return touched

    def _run_in_savepoints(self, connection: sa.Connection, group: WriteGroup, touched: Touched) -> None:
        by_work = Touched()
        transaction = SqlTransaction(connection, by_work)
        for work in group.works:
            _SAVEPOINT.run(connection, {})
            try:
                work.result = work.function(transaction)
                touched.merge(by_work)
            except BaseException as error:  # noqa: BLE001 - a thread's boundary: raised again where the caller awaits
                work.error = unavailable(error) if isinstance(error, sa.exc.OperationalError) else error
                connection.exec_driver_sql("ROLLBACK TO work")
            by_work.clear()
            _RELEASE.run(connection, {})

    def _roll_back(self) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            connection.exec_driver_sql("ROLLBACK")
        except sa.exc.SQLAlchemyError as error:
            # After a full disk SQLite may have rolled back by itself; then there is nothing to undo.
            if "no transaction is active" not in str(error):
                self._connection = None
                # What closing says of a broken connection is nobody's to act on.
                with suppress(sa.exc.SQLAlchemyError):
                    connection.close()

    def _end(self) -> None:
        self._writer.join()
        self._readers.join()
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()

    # On the event loop.

    def _answer(self, group: WriteGroup, touched: Touched) -> None:
        # The last one first: one that fails, which the loop logs, keeps neither the others nor the writers waiting.
        with ExitStack() as told:
            told.callback(self._go_on_writing)
            told.callback(group.tell)
            if touched:
                notice = CommitNotice(
                    job_sequences=touched.job_sequences,
                    jobs_changed=touched.jobs,
                    nodes_changed=touched.nodes,
                    moved_jobs=frozenset(touched.moved_jobs),
                    events=touched.events,
                )
                for listener in reversed(self._listeners):
                    told.callback(listener, notice)
                failpoint("store.before-wake")


def _open(database: Path) -> tuple[sa.Engine, sa.Connection, str]:
    database.parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine(database)
    connection = connect(engine, read_only=False)
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {_OPEN_TIMEOUT_MILLISECONDS}")
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    try:
        migrate(connection)
        installation_id = _installation_id(connection)
    except BaseException:
        connection.exec_driver_sql("ROLLBACK")
        connection.close()
        raise
    connection.exec_driver_sql("COMMIT")
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MILLISECONDS}")
    return engine, connection, installation_id


def _installation_id(connection: sa.Connection) -> str:
    table = schema.meta
    found = connection.execute(sa.select(table.c.value).where(table.c.key == "installation_id")).scalar()
    if found is not None:
        return str(found)
    made = secrets.token_hex(16)
    connection.execute(sa.insert(table).values(key="installation_id", value=made))
    return made
