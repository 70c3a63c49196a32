"""Jobs, plans and events on the wire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from google.protobuf import json_format

from control_service.app.ports import PlanLevel
from control_service.app.start_points import StartRequest
from control_service.domain.errors import FieldViolation, InvalidArgument
from control_service.domain.event import StoredEvent
from control_service.domain.job import JobProgress, JobView
from control_service.domain.job_state import JobState
from control_service.wire.training_spec import spec_message
from control_service.wire.values import enum_name, enum_number, failure_message, timestamp
from tunesmith.common.v1 import event_pb2, plan_pb2, training_spec_pb2
from tunesmith.control.v1 import job_service_pb2

# An unset level means EXACT.
_PLAN_LEVELS: Final[Mapping[int, PlanLevel]] = {
    plan_pb2.PLAN_LEVEL_UNSPECIFIED: PlanLevel.EXACT,
    plan_pb2.PLAN_LEVEL_CHECK: PlanLevel.CHECK,
    plan_pb2.PLAN_LEVEL_EXACT: PlanLevel.EXACT,
}

# Of specs that were asked for last, by their digests: a spec never changes, and is the largest part of a job.
_MAX_SPECS: Final = 64
_specs: Final[dict[str, training_spec_pb2.TrainingSpec]] = {}


def plan_level(number: int) -> PlanLevel:
    """How far planning goes."""
    return _PLAN_LEVELS[number]


def plan_message(plan: Mapping[str, Any]) -> plan_pb2.Plan:
    """A plan as a node gave it; fields that only the node's version knows are passed over."""
    return json_format.ParseDict(dict(plan), plan_pb2.Plan(), ignore_unknown_fields=True)


def start_request(request: job_service_pb2.StartTrainingRequest) -> StartRequest | None:
    """What a job is to start from; None when it starts from its base. InvalidArgument: a checkpoint of no job."""
    if request.start_from_checkpoint and not request.start_from_job_id:
        violation = FieldViolation("start_from_job_id", "must name the job whose checkpoint it is")
        raise InvalidArgument("INVALID_FIELD", "start_from_job_id is missing", violations=(violation,))
    if not request.start_from_job_id:
        return None
    return StartRequest(job_id=request.start_from_job_id, checkpoint=request.start_from_checkpoint)


def job_states(numbers: Iterable[int]) -> tuple[JobState, ...]:
    """States of a filter; validation let only named ones through."""
    return tuple(JobState(enum_name(event_pb2.JobState, number)) for number in numbers)


def job_message(view: JobView) -> job_service_pb2.Job:
    """A job with its place in the queue and its spec."""
    message = job_listing_message(view)
    digest = view.job.spec_digest
    if digest not in _specs:
        if len(_specs) >= _MAX_SPECS:
            _specs.clear()
        _specs[digest] = spec_message(view.job.spec)
    message.spec.CopyFrom(_specs[digest])
    return message


def job_listing_message(view: JobView) -> job_service_pb2.Job:
    """A job with its place in the queue; listings leave specs out."""
    job = view.job
    return job_service_pb2.Job(
        job_id=job.job_id,
        project_id=job.project_id,
        project_name=job.project_name,
        state=enum_number(event_pb2.JobState, job.state.value),
        phase=enum_number(event_pb2.Phase, job.phase.value),
        priority=job.priority,
        attempt=job.attempt,
        node=job.node,
        node_unreachable=job.node_unreachable,
        queue_position=view.queue_position,
        wait_reason=enum_number(job_service_pb2.WaitReason, view.wait_reason.value),
        wait_message=view.wait_message,
        progress=_progress_message(job.progress),
        failure=failure_message(job.failure),
        spec_digest=job.spec_digest,
        weights_digest=job.weights_digest,
        output_path=job.output_path,
        create_time=timestamp(job.create_time),
        start_time=timestamp(job.start_time),
        end_time=timestamp(job.end_time),
        last_sequence=job.last_sequence,
        retry_of_job_id=job.retry_of_job_id,
        retries_left=job.retries_left,
    )


def _progress_message(progress: JobProgress) -> job_service_pb2.JobProgress:
    return job_service_pb2.JobProgress(
        step=progress.step,
        total_steps=progress.total_steps,
        epoch=progress.epoch,
        loss=progress.loss,
        tokens_per_second=progress.tokens_per_second,
        remaining_seconds=progress.remaining_seconds,
    )


def event_message(event: StoredEvent) -> event_pb2.Event:
    """An event with its payload read."""
    return event_pb2.Event(
        sequence=event.sequence,
        attempt=event.attempt,
        run_sequence=event.run_sequence,
        # Enums are open on the wire: a kind that this version does not know is passed on as its number.
        kind=event.kind,  # type: ignore[arg-type]
        time=timestamp(event.time),
        payload=event_pb2.EventPayload.FromString(event.payload),
    )
