"""The threads that read the database, each over a connection of its own. Reads that wait are one group with one
snapshot: a group is begun with a few statements and a change of threads, which together take longer than a small read.
Writes nothing, and knows nothing of what is written.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from heapq import heappop, heappush
from typing import Final, TypeVar

import sqlalchemy as sa

from control_service.adapters.sql.engine import connect
from control_service.adapters.sql.groups import Group, Work
from control_service.adapters.sql.prepared import Prepared
from control_service.adapters.sql.refusals import BROKEN, unavailable
from control_service.adapters.sql.touched import Touched
from control_service.adapters.sql.transaction import SqlTransaction
from control_service.app.store_ports import Transaction

T = TypeVar("T")

_NUM_READERS: Final = 4
# Of one snapshot. A slow one keeps its neighbors waiting, so that there are not many.
_MAX_READS: Final = 32
# What is asked for waits for a reader that is at work only so long before it goes to another one.
_PATIENCE_SECONDS: Final = 0.005

_BEGIN, _ROLLBACK = Prepared(sa.text("BEGIN")), Prepared(sa.text("ROLLBACK"))


class Readers:
    """Made and used on one event loop; `stop`, then `join` in a thread."""

    def __init__(self, engine: sa.Engine) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Work] = []
        self._sending: asyncio.Handle | None = None
        # The first one again and again while it suffices: what it needs is at hand.
        self._idle = list(range(_NUM_READERS))
        self._threads = [_Reader(engine, partial(self._tell, number)) for number in self._idle]
        for thread in self._threads:
            thread.start()

    async def read(self, function: Callable[[Transaction], T]) -> T:
        """Runs a function over one snapshot, which is younger than the call. Raises what the function raises;
        Unavailable STORE_UNAVAILABLE."""
        answer: asyncio.Future[T] = self._loop.create_future()
        self._waiting.append(Work(function=function, answer=answer))
        if self._sending is None:
            self._await_turn()
        return await answer

    def stop(self) -> None:
        """Has the threads end when all that waits is read."""
        while self._waiting:
            self._threads[0].groups.put(self._gather())
        for thread in self._threads:
            thread.groups.put(None)

    def join(self) -> None:
        """Not on the event loop: waits for the threads, and closes their connections."""
        for thread in self._threads:
            thread.join()
            if thread.connection is not None:
                thread.connection.close()

    @property
    def _is_reading(self) -> bool:
        return len(self._idle) < len(self._threads)

    def _await_turn(self) -> None:
        if self._is_reading:
            self._sending = self._loop.call_later(_PATIENCE_SECONDS, self._send)
        else:
            self._sending = self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._sending = None
        # With every reader at work it is the first one to be done that goes on.
        if self._waiting and self._idle:
            self._threads[heappop(self._idle)].groups.put(self._gather())
            if self._waiting:
                self._await_turn()

    def _gather(self) -> Group:
        group = Group(self._waiting[:_MAX_READS])
        del self._waiting[:_MAX_READS]
        return group

    def _tell(self, number: int, group: Group) -> None:
        """In a reader's thread."""
        self._loop.call_soon_threadsafe(self._have_read, number, group)

    def _have_read(self, number: int, group: Group) -> None:
        heappush(self._idle, number)
        group.tell()
        if not self._waiting:
            return
        if self._sending is None:
            # Its patience ran out while every reader was at work.
            self._send()
        elif not self._is_reading:
            self._sending.cancel()
            self._await_turn()


class _Reader(threading.Thread):
    """Reads one group after the other, and tells of each."""

    def __init__(self, engine: sa.Engine, tell: Callable[[Group], None]) -> None:
        super().__init__(name="store-reader")
        self.groups: queue.SimpleQueue[Group | None] = queue.SimpleQueue()
        # None: not opened yet, or what is left of the last one is not known.
        self.connection: sa.Connection | None = None
        self._engine = engine
        self._tell = tell

    def run(self) -> None:
        """Until it is given None."""
        while (group := self.groups.get()) is not None:
            self._read(group)
            self._tell(group)

    def _read(self, group: Group) -> None:
        try:
            if self.connection is None:
                self.connection = connect(self._engine, read_only=True)
            _BEGIN.run(self.connection, {})
            try:
                transaction = SqlTransaction(self.connection, Touched())
                for work in group.works:
                    _read_one(work, transaction)
            finally:
                _ROLLBACK.run(self.connection, {})
        except Exception as error:  # noqa: BLE001 - a thread's boundary: told to all who wait, and the thread goes on
            self._forget_connection()
            for work in group.works:
                work.error = unavailable(error)

    def _forget_connection(self) -> None:
        broken, self.connection = self.connection, None
        if broken is not None:
            # What closing says of a broken connection is nobody's to act on.
            with suppress(sa.exc.SQLAlchemyError):
                broken.close()


def _read_one(work: Work, transaction: Transaction) -> None:
    """Errors of the database are the connection's, and everybody's."""
    try:
        work.result = work.function(transaction)
    except BROKEN:
        raise
    except BaseException as error:  # noqa: BLE001 - a thread's boundary: raised again where the caller awaits
        work.error = error
