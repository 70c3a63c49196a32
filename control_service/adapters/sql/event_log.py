"""Each job's events: numbered under the job's row, stored once, read by cursor. Payloads are never opened here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import sqlalchemy as sa

from control_service.adapters.sql import schema, statements
from control_service.adapters.sql.records import event_from_row, event_to_driver
from control_service.adapters.sql.touched import Touched
from control_service.domain.errors import FailedPrecondition, Internal, NotFound
from control_service.domain.event import EventKind, StoredEvent

# Events that tell of a change which the queue or a job's keeper must see to.
_MOVES_JOB = frozenset({int(EventKind.JOB_STATE), int(EventKind.NODE_REACHABILITY)})


class SqlEventLog:
    """Implements `EventLog`."""

    def __init__(self, connection: sa.Connection, touched: Touched) -> None:
        self._connection = connection
        self._touched = touched

    def append(self, job_id: str, *, attempt: int, events: Sequence[StoredEvent]) -> int:
        """See the port."""
        stored = self._store(job_id, [replace(event, run_sequence=0) for event in events], attempt=attempt)
        return stored[-1].sequence if stored else self.bounds(job_id)[1]

    def append_run_events(self, job_id: str, *, attempt: int, events: Sequence[StoredEvent]) -> Sequence[StoredEvent]:
        """See the port."""
        row = statements.GET_CURSOR.first(self._connection, {"at_job_id": job_id})
        if row is None or row["attempt"] != attempt:
            raise FailedPrecondition(
                "STALE_EPOCH",
                f"attempt {attempt} of job {job_id} is over",
                details={"attempt": str(0 if row is None else row["attempt"])},
            )
        cursor = row["run_cursor"]
        fresh = [event for event in events if event.run_sequence > cursor]
        expected = range(cursor + 1, cursor + 1 + len(fresh))
        if [event.run_sequence for event in fresh] != list(expected):
            raise Internal("INTERNAL", f"events of job {job_id} do not continue at run sequence {cursor + 1}")
        if not fresh:
            return []
        return self._store(job_id, fresh, attempt=attempt, run_cursor=fresh[-1].run_sequence)

    def page(self, job_id: str, *, after_sequence: int, limit: int) -> Sequence[StoredEvent]:
        """See the port."""
        where = {"at_job_id": job_id, "at_sequence": after_sequence, "num_events": limit}
        return [event_from_row(row) for row in statements.EVENTS_AFTER.run(self._connection, where)]

    def of_kind(self, job_id: str, *, attempt: int, kind: EventKind) -> Sequence[StoredEvent]:
        """See the port."""
        table = schema.events
        statement = (
            sa.select(table)
            .where(table.c.job_id == job_id, table.c.attempt == attempt, table.c.kind == int(kind))
            .order_by(table.c.sequence)
        )
        return [event_from_row({**row}) for row in self._connection.execute(statement).mappings()]

    def bounds(self, job_id: str) -> tuple[int, int]:
        """See the port."""
        newest = statements.NEWEST_SEQUENCE.first(self._connection, {"at_job_id": job_id})
        oldest = statements.OLDEST_SEQUENCE.first(self._connection, {"at_job_id": job_id})
        return (oldest["oldest"] or 0 if oldest else 0), (newest["last_sequence"] if newest else 0)

    def compact(self, job_id: str, *, before_sequence: int, limit: int) -> int:
        """See the port."""
        oldest, _ = self.bounds(job_id)
        table = schema.events
        # Sequences have no gap, so that the oldest `limit` are a range.
        end = min(before_sequence, oldest + limit)
        return self._connection.execute(
            sa.delete(table).where(table.c.job_id == job_id, table.c.sequence < end)
        ).rowcount

    def _store(
        self, job_id: str, events: Sequence[StoredEvent], *, attempt: int, run_cursor: int | None = None
    ) -> list[StoredEvent]:
        if not events:
            return []
        values: dict[str, object] = {"at_job_id": job_id, "num_events": len(events)}
        statement = statements.NUMBER_EVENTS
        if run_cursor is not None:
            statement = statements.NUMBER_RUN_EVENTS
            values["run_cursor"] = run_cursor
        row = statement.first(self._connection, values)
        if row is None:
            raise NotFound("JOB_NOT_FOUND", f"no job {job_id}")
        last = row["last_sequence"]
        first = last - len(events) + 1
        numbered = [
            StoredEvent(
                sequence=sequence,
                attempt=attempt,
                run_sequence=event.run_sequence,
                kind=event.kind,
                time=event.time,
                payload=event.payload,
            )
            for sequence, event in enumerate(events, start=first)
        ]
        self._insert(job_id, numbered)
        self._touched.append(job_id, numbered)
        if any(event.kind in _MOVES_JOB for event in numbered):
            self._touched.move(job_id)
        return numbered

    def _insert(self, job_id: str, events: Sequence[StoredEvent]) -> None:
        """Many rows a statement: between two the driver lets go of the interpreter and waits to have it back."""
        start = 0
        for size in statements.INSERT_SIZES:
            text = statements.insert_events(size, self._connection.dialect)
            while len(events) - start >= size:
                rows = (event_to_driver(job_id, event) for event in events[start : start + size])
                self._connection.exec_driver_sql(text, tuple(chain.from_iterable(rows)))
                start += size
