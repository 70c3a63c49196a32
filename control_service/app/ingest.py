"""Takes a batch of a run's events into the job's log: one transaction stores them, moves the cursor, and folds what
they say into the job and its checkpoints. Events of any attempt but the current one are refused; one that cannot be
read keeps its place in the log and says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog

from control_service.app.lookups import job_of
from control_service.app.ports import EventCodec
from control_service.app.store_ports import Store, Transaction
from control_service.domain.artifact import Checkpoint, CheckpointStatus
from control_service.domain.errors import FailedPrecondition, Internal
from control_service.domain.event import CheckpointFact, Fact, StoredEvent
from control_service.domain.failpoints import failpoint
from control_service.domain.job import Job
from control_service.domain.job_state import ON_NODE
from control_service.domain.progress import apply_fact

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """What a batch brought: the job after it, and whether a checkpoint was committed."""

    job: Job
    has_new_checkpoint: bool


async def ingest(
    job_id: str, attempt: int, events: Sequence[StoredEvent], *, store: Store, codec: EventCodec
) -> Ingested:
    """Stores a batch. FailedPrecondition STALE_EPOCH when the attempt is not the job's current one on a node."""
    events = [_readable(job_id, event, codec) for event in events]
    facts = {event.run_sequence: _fact(job_id, event, codec) for event in events}

    def work(tx: Transaction) -> Ingested:
        job = job_of(tx, job_id)
        if job.attempt != attempt or job.state not in ON_NODE:
            raise FailedPrecondition("STALE_EPOCH", f"attempt {attempt} of job {job_id} is over")
        fresh = tx.events.append_run_events(job_id, attempt=attempt, events=events)
        if not fresh:
            return Ingested(job=job, has_new_checkpoint=False)
        has_new_checkpoint = False
        # As the event log has just written it.
        job = replace(job, run_cursor=fresh[-1].run_sequence, last_sequence=fresh[-1].sequence)
        for event in fresh:
            fact = facts[event.run_sequence]
            job = apply_fact(job, fact)
            if isinstance(fact, CheckpointFact):
                _put_checkpoint(tx, job, event, fact)
                has_new_checkpoint |= fact.status is CheckpointStatus.COMMITTED
        return Ingested(job=tx.jobs.update(job), has_new_checkpoint=has_new_checkpoint)

    failpoint("ingest.before-commit")
    return await store.transact(work)


def _readable(job_id: str, event: StoredEvent, codec: EventCodec) -> StoredEvent:
    """The event, without its payload where that would break whoever reads a page with it."""
    if codec.is_payload(event.payload):
        return event
    _log.error(
        "event-is-no-payload",
        job_id=job_id,
        run_sequence=event.run_sequence,
        kind=int(event.kind),
        payload=event.payload[:64].hex(),
    )
    return replace(event, payload=b"")


def _fact(job_id: str, event: StoredEvent, codec: EventCodec) -> Fact | None:
    """What the event says; None also when it cannot be told, since asking for it again gives the same bytes."""
    try:
        return codec.decode(event.kind, event.payload)
    except Internal as error:
        _log.error("event-not-read", job_id=job_id, run_sequence=event.run_sequence, message=error.message)
        return None


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
            probe_loss=fact.probe_loss,
            held_out_loss=fact.held_out_loss,
            best=fact.best,
        )
    )
