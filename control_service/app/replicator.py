"""Copies a job's newest checkpoint into control's store while its run goes on, so that another node can go on from it.

Only checkpoints up to a size; keeps one. A copy that does not work out is a log line, and where control has no room a
warning in the job's log; the checkpoint stays on its node.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import structlog

from control_service.app.content import all_are_there, free_unnamed, naming
from control_service.app.fetch import fetch_files
from control_service.app.ports import BlobStore, Clock, EventCodec, NodeClient
from control_service.app.store_ports import Store, Transaction
from control_service.app.transitions import append_facts, checkpoint_fact
from control_service.domain.artifact import Checkpoint, CheckpointStatus
from control_service.domain.errors import Internal, TunesmithError, Unavailable
from control_service.domain.event import CheckpointFact, EventKind, WarningFact
from control_service.domain.failpoints import failpoint
from control_service.domain.job import Job
from control_service.domain.job_state import ON_NODE

_log = structlog.get_logger(__name__)
# The code of the warning that control has no room for a job's checkpoint.
NOT_REPLICATED = "checkpoint-not-replicated"
_NO_ROOM = "DISK_FULL"


class Replicator:
    """Stateless but for its ports."""

    def __init__(
        self, *, store: Store, blobs: BlobStore, codec: EventCodec, clock: Clock, max_checkpoint_bytes: int
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._codec = codec
        self._clock = clock
        self._max_checkpoint_bytes = max_checkpoint_bytes

    async def replicate_newest(self, job: Job, client: NodeClient) -> bool:
        """Copies the newest checkpoint that the job's node has, if there is one that is small enough. False: it could
        not be done just now (no room, or no answer), and is to be tried again."""
        checkpoints = await self._store.read(lambda tx: tx.checkpoints.list_for_job(job.job_id))
        # One of a later step may lie on a node that was lost.
        there = [checkpoint for checkpoint in checkpoints if checkpoint.node == job.node]
        newest = there[-1] if there else None
        if newest is None or newest.status is not CheckpointStatus.COMMITTED:
            return True
        if not newest.files or newest.size_bytes > self._max_checkpoint_bytes:
            return True
        contents = {file.sha256 for file in newest.files}
        try:
            await fetch_files(client, self._blobs, newest.files)
            async with naming(self._blobs):
                if await all_are_there(contents, blobs=self._blobs):
                    failpoint("replicate.before-commit")
                    contents |= await self._store.transact(lambda tx: self._mark(tx, job, newest))
        except TunesmithError as error:
            _log.info(NOT_REPLICATED, job_id=job.job_id, checkpoint=newest.name, reason=error.reason)
            if error.reason == _NO_ROOM:
                await self._warn(job, newest, error)
            return error.reason != _NO_ROOM and not isinstance(error, Unavailable)
        else:
            return True
        finally:
            # Also when the keeper ends it half way: what no record names is freed.
            await free_unnamed(contents, store=self._store, blobs=self._blobs)

    async def _warn(self, job: Job, newest: Checkpoint, error: TunesmithError) -> None:
        """Says so in the job's log, once until a checkpoint was replicated again."""
        message = f"checkpoint {newest.name} is on node {job.node} alone until control has room: {error.message}"

        def work(tx: Transaction) -> None:
            current = tx.jobs.get(job.job_id)
            if current is None or current.attempt != job.attempt or current.state not in ON_NODE:
                return
            if self._last(tx, job, EventKind.WARNING) <= self._last(tx, job, EventKind.CHECKPOINT):
                fact = WarningFact(code=NOT_REPLICATED, message=message)
                append_facts(tx, current, [fact], codec=self._codec, now=self._clock.utc_now())

        try:
            await self._store.transact(work)
        except TunesmithError as refusal:
            # The database may lie on the same disk; it is said when the copy is tried again.
            _log.info("warning-not-stored", job_id=job.job_id, reason=refusal.reason)

    def _last(self, tx: Transaction, job: Job, kind: EventKind) -> int:
        """Sequence of the attempt's last event that says a copy was made (CHECKPOINT) or was not (WARNING); 0: none."""
        last = 0
        for event in tx.events.of_kind(job.job_id, attempt=job.attempt, kind=kind):
            with suppress(Internal):  # one that cannot be read says nothing
                fact = self._codec.decode(event.kind, event.payload)
                is_copy = isinstance(fact, CheckpointFact) and fact.status is CheckpointStatus.REPLICATED
                if is_copy or (isinstance(fact, WarningFact) and fact.code == NOT_REPLICATED):
                    last = event.sequence
        return last

    def _mark(self, tx: Transaction, job: Job, newest: Checkpoint) -> set[str]:
        """Makes it the one replicated checkpoint; gives the content that lost a holder."""
        current = tx.jobs.get(job.job_id)
        if current is None or current.attempt != job.attempt or current.state not in ON_NODE:
            return set()
        facts = [checkpoint_fact(newest, CheckpointStatus.REPLICATED)]
        freed: set[str] = set()
        for earlier in tx.checkpoints.list_for_job(job.job_id):
            if earlier.name == newest.name:
                # Its node may have freed its copy in the meantime; then control's is the only one.
                tx.checkpoints.put(replace(earlier, status=CheckpointStatus.REPLICATED))
            elif earlier.status is CheckpointStatus.REPLICATED:
                status = CheckpointStatus.COMMITTED if earlier.node else CheckpointStatus.DELETED
                tx.checkpoints.put(replace(earlier, status=status))
                freed.update(file.sha256 for file in earlier.files)
                if status is CheckpointStatus.DELETED:
                    facts.append(checkpoint_fact(earlier, status))
        append_facts(tx, current, facts, codec=self._codec, now=self._clock.utc_now())
        return freed
