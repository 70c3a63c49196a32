"""Carries out a `Settle`: moves the job in one transaction, provided that nothing moved it since the decision, and
frees what a job that is over no longer needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import structlog

from control_service.app.content import free_unnamed
from control_service.app.ports import BlobStore, Clock, EventCodec
from control_service.app.store_ports import Store, Transaction
from control_service.app.transitions import append_facts, change_state
from control_service.domain import retry
from control_service.domain.artifact import Checkpoint, CheckpointStatus
from control_service.domain.event import CheckpointFact
from control_service.domain.job import Job
from control_service.domain.job_state import TERMINAL, JobState
from control_service.domain.reconcile import Settle, is_uncollected

_log = structlog.get_logger(__name__)


class Settler:
    """Stateless but for its ports."""

    def __init__(
        self, *, store: Store, blobs: BlobStore, codec: EventCodec, clock: Clock, keep_checkpoints: bool
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._codec = codec
        self._clock = clock
        self._keep_checkpoints = keep_checkpoints

    async def settle(self, job: Job, settle: Settle, *, not_before: datetime | None = None) -> None:
        """Moves the job; nothing happens when its state or attempt is not the one that the decision saw."""
        now = self._clock.utc_now()

        def work(tx: Transaction) -> Sequence[str]:
            current = tx.jobs.get(job.job_id)
            if current is None or current.attempt != job.attempt or current.state is not job.state:
                return ()
            num_retries = current.num_retries + (1 if settle.counts_as_retry else 0)
            wait = not_before
            if settle.counts_as_retry:
                wait = now + timedelta(seconds=retry.back_off_seconds(num_retries))
            freed = self.forget_checkpoints(tx, current, settle.state, now)
            change_state(
                tx,
                current,
                settle.state,
                codec=self._codec,
                now=now,
                message=settle.message,
                failure=settle.failure,
                num_retries=num_retries,
                not_before=wait,
            )
            return freed

        freed = await self._store.transact(work)
        _log.info("job-settled", job_id=job.job_id, attempt=job.attempt, state=settle.state, message=settle.message)
        await self.free(freed)

    def forget_checkpoints(self, tx: Transaction, job: Job, state: JobState, now: datetime) -> Sequence[str]:
        """Marks the checkpoints of a job that is about to be over as deleted; gives the content that lost a holder.

        Nothing goes on from them any more, and their run is released. A job that was trained but could not be
        collected keeps them.
        """
        if state not in TERMINAL or self._keep_checkpoints or is_uncollected(job, state):
            return ()
        kept = [c for c in tx.checkpoints.list_for_job(job.job_id) if c.status is not CheckpointStatus.DELETED]
        for checkpoint in kept:
            tx.checkpoints.put(replace(checkpoint, status=CheckpointStatus.DELETED))
        facts = [checkpoint_fact(checkpoint, CheckpointStatus.DELETED) for checkpoint in kept]
        if facts:
            append_facts(tx, job, facts, codec=self._codec, now=now)
        return sorted({file.sha256 for c in kept if c.status is CheckpointStatus.REPLICATED for file in c.files})

    async def free(self, sha256s: Sequence[str]) -> None:
        """Deletes those of the contents that nobody holds."""
        await free_unnamed(sha256s, store=self._store, blobs=self._blobs)


def checkpoint_fact(checkpoint: Checkpoint, status: CheckpointStatus) -> CheckpointFact:
    """The fact that a checkpoint has a status."""
    return CheckpointFact(
        name=checkpoint.name,
        step=checkpoint.step,
        status=status,
        size_bytes=checkpoint.size_bytes,
        manifest_sha256=checkpoint.manifest_sha256,
        files=checkpoint.files,
    )
