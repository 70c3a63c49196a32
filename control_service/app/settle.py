"""Carries out a `Settle`: moves the job in one transaction, provided that nothing moved it since the decision. Frees
what was copied of artifacts that nobody will get; checkpoints of jobs that are over are the sweeper's."""

from __future__ import annotations

from datetime import datetime, timedelta

import structlog

from control_service.app.checkpoints import forget_checkpoint
from control_service.app.content import artifact_contents, free_unnamed
from control_service.app.ports import BlobStore, Clock, EventCodec
from control_service.app.store_ports import Store, Transaction
from control_service.app.transitions import change_state
from control_service.domain import retry
from control_service.domain.failpoints import failpoint
from control_service.domain.job import Job
from control_service.domain.job_state import TERMINAL
from control_service.domain.reconcile import Settle
from control_service.domain.run import RunState

_log = structlog.get_logger(__name__)


class Settler:
    """Stateless but for its ports."""

    def __init__(self, *, store: Store, blobs: BlobStore, codec: EventCodec, clock: Clock) -> None:
        self._store = store
        self._blobs = blobs
        self._codec = codec
        self._clock = clock

    async def settle(self, job: Job, settle: Settle, *, not_before: datetime | None = None) -> None:
        """Moves the job; nothing happens when its state or attempt is not the one that the decision saw."""
        now = self._clock.utc_now()

        def work(tx: Transaction) -> bool:
            current = tx.jobs.get(job.job_id)
            if current is None or current.attempt != job.attempt or current.state is not job.state:
                return False
            damaged = retry.damaged_checkpoint(settle.failure)
            if damaged:
                forget_checkpoint(tx, current, damaged, codec=self._codec, now=now)
            num_retries = current.num_retries + (1 if settle.counts_as_retry else 0)
            wait = not_before
            if settle.counts_as_retry:
                wait = now + timedelta(seconds=retry.back_off_seconds(num_retries))
            change_state(
                tx,
                current,
                settle.state,
                codec=self._codec,
                now=now,
                message=settle.message,
                failure=settle.failure,
                keep_failure=settle.keeps_failure,
                num_retries=num_retries,
                not_before=wait,
            )
            return True

        failpoint("settle.before-commit")
        if not await self._store.transact(work):
            return
        _log.info("job-settled", job_id=job.job_id, attempt=job.attempt, state=settle.state, message=settle.message)
        if settle.state in TERMINAL and job.run_state is RunState.SUCCEEDED:
            await self._forget_artifacts(job)

    async def _forget_artifacts(self, job: Job) -> None:
        """Deletes what was copied of artifacts that will not be collected."""
        await self._blobs.remove_output(path=job.output_path)
        contents = await self._store.read(lambda tx: artifact_contents(tx, job, self._codec))
        await free_unnamed(contents, store=self._store, blobs=self._blobs)
