"""Takes a batch of a run's events into the job's log: one transaction stores them, moves the cursor, and folds what
they say into the job and its checkpoints. Events of any attempt but the current one are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from control_service.app.lookups import job_of
from control_service.app.ports import EventCodec
from control_service.app.store_ports import Store, Transaction
from control_service.domain.artifact import Checkpoint, CheckpointStatus
from control_service.domain.errors import FailedPrecondition
from control_service.domain.event import CheckpointFact, StoredEvent
from control_service.domain.job import Job
from control_service.domain.job_state import ON_NODE
from control_service.domain.progress import apply_fact


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """What a batch brought: the job after it, and whether a checkpoint was committed."""

    job: Job
    has_new_checkpoint: bool


async def ingest(
    job_id: str, attempt: int, events: Sequence[StoredEvent], *, store: Store, codec: EventCodec
) -> Ingested:
    """Stores a batch. FailedPrecondition STALE_EPOCH when the attempt is not the job's current one on a node."""
    facts = {event.run_sequence: codec.decode(event.kind, event.payload) for event in events}

    def work(tx: Transaction) -> Ingested:
        job = job_of(tx, job_id)
        if job.attempt != attempt or job.state not in ON_NODE:
            raise FailedPrecondition("STALE_EPOCH", f"attempt {attempt} of job {job_id} is over")
        fresh = tx.events.append_run_events(job_id, attempt=attempt, events=events)
        if not fresh:
            return Ingested(job=job, has_new_checkpoint=False)
        has_new_checkpoint = False
        # Read again: the event log moved the cursor.
        job = job_of(tx, job_id)
        for event in fresh:
            fact = facts[event.run_sequence]
            job = apply_fact(job, fact)
            if isinstance(fact, CheckpointFact):
                _put_checkpoint(tx, job, event, fact)
                has_new_checkpoint |= fact.status is CheckpointStatus.COMMITTED
        return Ingested(job=tx.jobs.update(job), has_new_checkpoint=has_new_checkpoint)

    return await store.transact(work)


def _put_checkpoint(tx: Transaction, job: Job, event: StoredEvent, fact: CheckpointFact) -> None:
    known = {checkpoint.name: checkpoint for checkpoint in tx.checkpoints.list_for_job(job.job_id)}
    earlier = known.get(fact.name)
    if fact.status is CheckpointStatus.DELETED:
        if earlier is None:
            return
        # The node freed its copy; control's own, if it has one, is still good.
        kept = earlier.status is CheckpointStatus.REPLICATED
        tx.checkpoints.put(replace(earlier, node="", status=earlier.status if kept else CheckpointStatus.DELETED))
        return
    tx.checkpoints.put(
        Checkpoint(
            job_id=job.job_id,
            attempt=job.attempt,
            name=fact.name,
            step=fact.step,
            status=fact.status,
            size_bytes=fact.size_bytes,
            manifest_sha256=fact.manifest_sha256,
            files=fact.files,
            node=job.node,
            create_time=event.time,
        )
    )
