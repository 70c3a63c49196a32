"""Moves a job to another state: the record and the event of it in one transaction. The only writer of JOB_STATE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from control_service.app.ports import EventCodec
from control_service.app.store_ports import Transaction
from control_service.domain.artifact import Checkpoint, CheckpointStatus
from control_service.domain.event import CheckpointFact, ControlFact, JobStateFact, StoredEvent
from control_service.domain.failure import Failure
from control_service.domain.job import Job
from control_service.domain.job_state import TERMINAL, JobState
from control_service.domain.run import Phase


def control_event(fact: ControlFact, *, codec: EventCodec, now: datetime) -> StoredEvent:
    """An event of control's own; the event log numbers it."""
    kind, payload = codec.encode(fact)
    return StoredEvent(sequence=0, attempt=0, run_sequence=0, kind=kind, time=now, payload=payload)


def append_facts(tx: Transaction, job: Job, facts: Sequence[ControlFact], *, codec: EventCodec, now: datetime) -> None:
    """Appends control's facts to the job's log under its current attempt."""
    tx.events.append(
        job.job_id, attempt=job.attempt, events=[control_event(fact, codec=codec, now=now) for fact in facts]
    )


def checkpoint_fact(checkpoint: Checkpoint, status: CheckpointStatus) -> CheckpointFact:
    """That a checkpoint has a new status."""
    return CheckpointFact(
        name=checkpoint.name,
        step=checkpoint.step,
        status=status,
        size_bytes=checkpoint.size_bytes,
        manifest_sha256=checkpoint.manifest_sha256,
        files=checkpoint.files,
        probe_loss=checkpoint.probe_loss,
        held_out_loss=checkpoint.held_out_loss,
        best=checkpoint.best,
    )


def insert_job(tx: Transaction, job: Job, *, codec: EventCodec, now: datetime, message: str = "") -> None:
    """Stores a new job with the event of its first state."""
    tx.jobs.insert(job)
    append_facts(tx, job, [JobStateFact(previous_state=None, state=job.state, message=message)], codec=codec, now=now)


def change_state(
    tx: Transaction,
    job: Job,
    state: JobState,
    *,
    codec: EventCodec,
    now: datetime,
    message: str = "",
    failure: Failure | None = None,
    keep_failure: bool = False,
    **changes: Any,
) -> Job:
    """Moves a job by the table and appends the event; `changes` are further fields of the record.

    `failure` is why it moved: the event's and the job's. Without one the job has none from now on, or, with
    `keep_failure`, still that of its last attempt, which the log has told already. A job that leaves its node rests
    without phase and reachability; one that is over gets its end time.
    """
    kept = job.failure if keep_failure and failure is None else failure
    rests = state in TERMINAL or state in (JobState.QUEUED, JobState.PAUSED)
    if rests:
        changes = {"phase": Phase.UNSPECIFIED, "node_unreachable": False, **changes}
    if state in TERMINAL:
        # Never before its beginning, whatever the clock was set to meanwhile.
        changes = {"end_time": max(now, job.start_time or job.create_time, job.create_time), **changes}
    moved = tx.jobs.update(replace(job.with_state(state), failure=kept, **changes))
    fact = JobStateFact(
        previous_state=job.state,
        state=state,
        message=message,
        failure=failure,
        node="" if not moved.attempt else moved.node,
    )
    append_facts(tx, moved, [fact], codec=codec, now=now)
    return moved
