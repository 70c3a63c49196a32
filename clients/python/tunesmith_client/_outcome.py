"""How a job ended, as a value or as an error. Pure."""

from tunesmith.common.v1 import errors_pb2, event_pb2
from tunesmith.control.v1 import job_service_pb2
from tunesmith_client._errors import JobFailed

TERMINAL_STATES = frozenset((event_pb2.JOB_STATE_SUCCEEDED, event_pb2.JOB_STATE_FAILED, event_pb2.JOB_STATE_CANCELLED))


def reason_name(reason: int) -> str:
    """`ENGINE_KILLED` for the enum's number; a number that this version does not know, as digits."""
    value = errors_pb2.ErrorReason.DESCRIPTOR.values_by_number.get(reason)
    return value.name.removeprefix("ERROR_REASON_") if value is not None else str(reason)


def state_name(state: int) -> str:
    """`RUNNING` for the enum's number; a number that this version does not know, as digits."""
    value = event_pb2.JobState.DESCRIPTOR.values_by_number.get(state)
    return value.name.removeprefix("JOB_STATE_") if value is not None else str(state)


def job_result(job: job_service_pb2.Job, *, check: bool) -> job_service_pb2.Job:
    """The job; raises JobFailed when it is to be checked and did not succeed."""
    if not check or job.state == event_pb2.JOB_STATE_SUCCEEDED:
        return job
    state = state_name(job.state)
    reason = reason_name(job.failure.reason) if job.HasField("failure") else ""
    message = job.failure.message or f"job {job.job_id} ended {state}"
    raise JobFailed(message, reason=reason, job_id=job.job_id, state=state)
