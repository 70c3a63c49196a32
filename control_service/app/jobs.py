"""Use cases of jobs that exist: read, list, cancel, pause, resume, delete, and their events and checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from control_service.app.idempotency import RequestKey
from control_service.app.ports import BlobStore, Clock, EventCodec, NodeDirectory
from control_service.app.store_ports import Store
from control_service.domain.artifact import Checkpoint
from control_service.domain.event import StoredEvent
from control_service.domain.job import JobView
from control_service.domain.job_state import JobState


@dataclass(frozen=True, kw_only=True)
class EventPage:
    """Events after a sequence, and the newest sequence of the log."""

    events: Sequence[StoredEvent]
    last_sequence: int


async def get_job(job_id: str, *, store: Store, nodes: NodeDirectory, clock: Clock) -> JobView:
    """One job with its position and why it waits. NotFound JOB_NOT_FOUND."""
    raise NotImplementedError


async def list_jobs(
    *,
    store: Store,
    nodes: NodeDirectory,
    clock: Clock,
    before_job_id: str = "",
    limit: int = 50,
    project_id: int = 0,
    states: Collection[JobState] = (),
) -> Sequence[JobView]:
    """Jobs newest first, before an id; project_id 0 and no states mean all."""
    raise NotImplementedError


async def cancel_job(
    job_id: str,
    *,
    store: Store,
    nodes: NodeDirectory,
    clock: Clock,
    codec: EventCodec,
    request: RequestKey | None = None,
) -> JobView:
    """Asks for the end of a job; one that is over is answered as it is. NotFound JOB_NOT_FOUND."""
    raise NotImplementedError


async def pause_job(
    job_id: str,
    *,
    store: Store,
    nodes: NodeDirectory,
    clock: Clock,
    codec: EventCodec,
    request: RequestKey | None = None,
) -> JobView:
    """Asks a running job to checkpoint and free its device. FailedPrecondition JOB_STATE."""
    raise NotImplementedError


async def resume_job(
    job_id: str,
    *,
    store: Store,
    nodes: NodeDirectory,
    clock: Clock,
    codec: EventCodec,
    request: RequestKey | None = None,
) -> JobView:
    """Queues a paused job again. FailedPrecondition JOB_STATE."""
    raise NotImplementedError


async def delete_job(
    job_id: str, *, store: Store, blobs: BlobStore, clock: Clock, request: RequestKey | None = None
) -> None:
    """Deletes a job that is over, its log, records, output and unshared bytes. FailedPrecondition JOB_STATE."""
    raise NotImplementedError


async def list_job_events(job_id: str, *, store: Store, after_sequence: int = 0, limit: int = 100) -> EventPage:
    """A page of events. NotFound JOB_NOT_FOUND; OutOfRange HISTORY_COMPACTED with `oldest_sequence`,
    SEQUENCE_IN_FUTURE."""
    raise NotImplementedError


async def list_checkpoints(job_id: str, *, store: Store) -> Sequence[Checkpoint]:
    """A job's checkpoints by step. NotFound JOB_NOT_FOUND."""
    raise NotImplementedError
