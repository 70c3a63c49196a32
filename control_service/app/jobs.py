"""Use cases of jobs that exist: read, list, cancel, pause, resume, delete, and their events and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from control_service.app.content import free_unnamed
from control_service.app.idempotency import RequestKey, earlier_reference, once
from control_service.app.lookups import job_of
from control_service.app.ports import BlobStore, Clock, EventCodec
from control_service.app.queue import JobQueue
from control_service.app.store_ports import Store, Transaction
from control_service.app.transitions import change_state
from control_service.domain.artifact import Checkpoint
from control_service.domain.errors import OutOfRange
from control_service.domain.event import StoredEvent
from control_service.domain.job import Job, JobView
from control_service.domain.job_state import CAN_PAUSE, CAN_RESUME, ON_NODE, TERMINAL, JobState, check_verb
from control_service.domain.start_from import start_files


@dataclass(frozen=True, kw_only=True)
class EventPage:
    """Events after a sequence, and the newest sequence of the log."""

    events: Sequence[StoredEvent]
    last_sequence: int


async def get_job(job_id: str, *, store: Store, queue: JobQueue) -> JobView:
    """One job with its position and why it waits. NotFound JOB_NOT_FOUND."""
    return await queue.view_of(await store.read(lambda tx: job_of(tx, job_id)))


async def list_jobs(
    *,
    store: Store,
    queue: JobQueue,
    before_job_id: str = "",
    limit: int = 50,
    project_id: int = 0,
    states: Collection[JobState] = (),
) -> Sequence[JobView]:
    """Jobs newest first, before an id; project_id 0 and no states mean all."""

    def read(tx: Transaction) -> Sequence[Job]:
        return tx.jobs.list_page(before_job_id=before_job_id, limit=limit, project_id=project_id, states=states)

    return await queue.views_of(await store.read(read))


async def cancel_job(
    job_id: str,
    *,
    store: Store,
    queue: JobQueue,
    clock: Clock,
    codec: EventCodec,
    request: RequestKey | None = None,
) -> JobView:
    """Asks for the end of a job; one that is over is answered as it is. NotFound JOB_NOT_FOUND."""

    def cancel(tx: Transaction, job: Job, now: datetime) -> None:
        if job.state in (JobState.QUEUED, JobState.PAUSED):
            change_state(tx, job, JobState.CANCELLED, codec=codec, now=now, message="cancelled before it ran on")
        elif job.state in ON_NODE and job.state is not JobState.CANCELLING:
            # The failure stays: it may be the outcome that the log holds already.
            change_state(
                tx,
                job,
                JobState.CANCELLING,
                codec=codec,
                now=now,
                message="cancel was asked for",
                keep_failure=True,
            )

    return await _change(job_id, cancel, store=store, queue=queue, clock=clock, request=request)


async def pause_job(
    job_id: str,
    *,
    store: Store,
    queue: JobQueue,
    clock: Clock,
    codec: EventCodec,
    request: RequestKey | None = None,
) -> JobView:
    """Asks a running job to checkpoint and free its device. FailedPrecondition JOB_STATE."""

    def pause(tx: Transaction, job: Job, now: datetime) -> None:
        check_verb("pause", job.state, CAN_PAUSE)
        change_state(tx, job, JobState.PAUSING, codec=codec, now=now, message="pause was asked for", keep_failure=True)

    return await _change(job_id, pause, store=store, queue=queue, clock=clock, request=request)


async def resume_job(
    job_id: str,
    *,
    store: Store,
    queue: JobQueue,
    clock: Clock,
    codec: EventCodec,
    request: RequestKey | None = None,
) -> JobView:
    """Queues a paused job again. FailedPrecondition JOB_STATE."""

    def resume(tx: Transaction, job: Job, now: datetime) -> None:
        check_verb("resume", job.state, CAN_RESUME)
        change_state(tx, job, JobState.QUEUED, codec=codec, now=now, message="resumed")

    return await _change(job_id, resume, store=store, queue=queue, clock=clock, request=request)


async def _change(
    job_id: str,
    change: Callable[[Transaction, Job, datetime], None],
    *,
    store: Store,
    queue: JobQueue,
    clock: Clock,
    request: RequestKey | None,
) -> JobView:
    now = clock.utc_now()

    def work(tx: Transaction) -> Job:
        def do() -> tuple[str, Job]:
            change(tx, job_of(tx, job_id), now)
            return job_id, job_of(tx, job_id)

        return once(tx, request, now, work=do, replay=lambda reference: job_of(tx, reference))

    return await queue.view_of_stored(await store.transact(work))


async def delete_job(
    job_id: str, *, store: Store, blobs: BlobStore, clock: Clock, request: RequestKey | None = None
) -> None:
    """Deletes a job that is over, its log, records, output and unshared bytes. FailedPrecondition JOB_STATE."""
    now = clock.utc_now()

    def look(tx: Transaction) -> str:
        if earlier_reference(tx, request) is not None:
            return ""
        job = job_of(tx, job_id)
        check_verb("delete", job.state, TERMINAL)
        return job.output_path

    def work(tx: Transaction) -> Sequence[str]:
        """The contents that lost a holder."""

        def delete() -> tuple[str, Sequence[str]]:
            held = {file.sha256 for file in start_files(job_of(tx, job_id).spec)}
            held |= {file.sha256 for artifact in tx.artifacts.list_for_job(job_id) for file in artifact.files}
            held |= {file.sha256 for checkpoint in tx.checkpoints.list_for_job(job_id) for file in checkpoint.files}
            tx.jobs.delete(job_id)
            return "", sorted(held)

        return once(tx, request, now, work=delete, replay=lambda _: ())

    # The output goes before its record: after a crash between the two the job is there to be deleted again, and
    # nothing lies on the disk that nobody knows of.
    if output_path := await store.read(look):
        await blobs.remove_output(path=output_path)
    await free_unnamed(await store.transact(work), store=store, blobs=blobs)


async def list_job_events(job_id: str, *, store: Store, after_sequence: int = 0, limit: int = 100) -> EventPage:
    """A page of events. NotFound JOB_NOT_FOUND; OutOfRange HISTORY_COMPACTED with `oldest_sequence`,
    SEQUENCE_IN_FUTURE."""

    def read(tx: Transaction) -> EventPage:
        job_of(tx, job_id)
        last_sequence = check_position(tx, job_id, after_sequence)
        events = tx.events.page(job_id, after_sequence=after_sequence, limit=limit)
        return EventPage(events=events, last_sequence=last_sequence)

    return await store.read(read)


def check_position(tx: Transaction, job_id: str, after_sequence: int) -> int:
    """The newest sequence; OutOfRange when nothing can be read after `after_sequence` without a gap."""
    oldest, newest = tx.events.bounds(job_id)
    if after_sequence > newest:
        raise OutOfRange(
            "SEQUENCE_IN_FUTURE",
            f"the newest event of job {job_id} has sequence {newest}",
            details={"last_sequence": str(newest)},
        )
    if newest and after_sequence < oldest - 1:
        raise OutOfRange(
            "HISTORY_COMPACTED",
            f"events of job {job_id} before sequence {oldest} were compacted",
            details={"oldest_sequence": str(oldest)},
        )
    return newest


async def list_checkpoints(job_id: str, *, store: Store) -> Sequence[Checkpoint]:
    """A job's checkpoints by step. NotFound JOB_NOT_FOUND."""

    def read(tx: Transaction) -> Sequence[Checkpoint]:
        job_of(tx, job_id)
        return tx.checkpoints.list_for_job(job_id)

    return await store.read(read)
