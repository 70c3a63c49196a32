"""Compacts the logs of jobs that have been over for longer than a setting: of their events only the last stays, which
says how the job ended. Touches no job that is not over, and by default does nothing."""

from __future__ import annotations

from datetime import timedelta

import structlog

from control_service.app.back_off import BackOffConfig
from control_service.app.ports import Clock
from control_service.app.store_ports import Store, Transaction
from control_service.app.tasks import TaskSet
from control_service.domain.failpoints import failpoint

_log = structlog.get_logger(__name__)

# Of one transaction: the writer is never held up for long.
_MAX_EVENTS = 2000
_PAUSE_SECONDS = 600.0


class Compactor:
    """Looks at start and every ten minutes."""

    def __init__(self, *, store: Store, clock: Clock, back_off: BackOffConfig, retention: timedelta) -> None:
        """A `retention` of 0 keeps every event for ever."""
        self._store = store
        self._clock = clock
        self._back_off = back_off
        self._retention = retention
        self._tasks = TaskSet()

    def start(self) -> None:
        """Compacts from now on, if the setting says so."""
        if self._retention:
            self._tasks.keep("compactor", self._run, clock=self._clock, back_off=self._back_off)

    async def stop(self) -> None:
        """Ends the task."""
        await self._tasks.stop_all()

    async def _run(self) -> None:
        while True:
            num_events = 0
            while compacted := await self._store.transact(self._compact):
                num_events += compacted
                failpoint("compact.between-transactions")
            if num_events:
                _log.info("events-compacted", num_events=num_events)
            await self._clock.sleep(_PAUSE_SECONDS)

    def _compact(self, tx: Transaction) -> int:
        """Deletes some events of one job; how many. 0: there is nothing left to compact."""
        ended_before = self._clock.utc_now() - self._retention
        job = tx.jobs.find_compactable(ended_before=ended_before)
        if job is None:
            return 0
        return tx.events.compact(job.job_id, before_sequence=job.last_sequence, limit=_MAX_EVENTS)
