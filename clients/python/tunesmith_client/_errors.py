"""Typed errors, read from `google.rpc.Status` details; never from a message's text. Raises nothing on its own.

TunesmithError
├── Refused                 the request itself must change; the same again gets the same
│   ├── InvalidArgument         a field or a combination; see field_violations
│   │   └── OutOfRange          a sequence or offset beyond the ends (HISTORY_COMPACTED)
│   ├── NotFound
│   ├── AlreadyExists
│   ├── FailedPrecondition      not in this state
│   ├── Aborted                 somebody else changed it first (ETAG_MISMATCH)
│   └── AccessDenied            UNAUTHENTICATED and PERMISSION_DENIED
├── Unavailable             the service cannot be reached or is stopping; later may help
├── DeadlineExceeded        no answer in time; the work may have been done
├── ResourceExhausted       too much at once, too large, or no disk
├── ServiceDefect           INTERNAL, UNKNOWN, DATA_LOSS, UNIMPLEMENTED
├── CallCancelled           the call was cancelled (not the job)
├── TransferDamaged         downloaded bytes are not the ones that were promised; raised by this side
└── JobFailed               a job that was waited for did not succeed; raised by this side
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

_STATUS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, kw_only=True)
class FieldViolation:
    """One field (or line) of a request that broke its constraint."""

    field: str
    description: str


class TunesmithError(Exception):
    """Root of everything this package raises about a call.

    `reason` is the machine-readable name (`DATASET_NOT_FOUND`); a reason that this version does not know stays as the
    string it came as, and it is empty when the failure never reached the service.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
        field_violations: tuple[FieldViolation, ...] = (),
        retry_after_seconds: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.code = code
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.field_violations = field_violations
        self.retry_after_seconds = retry_after_seconds
        # The id that the service's log has for this call; empty when it sent none.
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}" if self.reason else self.message


class Refused(TunesmithError):
    """The request must change."""


class InvalidArgument(Refused):
    """A field, or how fields go together."""


class OutOfRange(InvalidArgument):
    """A sequence or offset that is not there."""


class NotFound(Refused):
    """No such thing."""


class AlreadyExists(Refused):
    """Taken."""


class FailedPrecondition(Refused):
    """Not in this state."""


class Aborted(Refused):
    """Somebody else was first; read again."""


class AccessDenied(Refused):
    """Not allowed."""


class Unavailable(TunesmithError):
    """Cannot be reached just now."""


class DeadlineExceeded(TunesmithError):
    """No answer in time."""


class ResourceExhausted(TunesmithError):
    """Too much."""


class ServiceDefect(TunesmithError):
    """The service's own fault."""


class CallCancelled(TunesmithError):
    """The call was cancelled."""


class TransferDamaged(TunesmithError):
    """The bytes that came do not have the promised size or SHA-256, or their name leaves the destination."""


class JobFailed(TunesmithError):
    """A job ended FAILED or CANCELLED. `reason` is the failure's; `job_id` and `state` (a name) say which and how."""

    def __init__(self, message: str, *, reason: str, job_id: str, state: str) -> None:
        super().__init__(message, reason=reason)
        self.job_id = job_id
        self.state = state


_CLASS_BY_CODE: Mapping[grpc.StatusCode, type[TunesmithError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.CANCELLED: CallCancelled,
}


def error_from_parts(code: grpc.StatusCode, message: str, status_bytes: bytes | None) -> TunesmithError:
    """The typed error for a status code and the serialized `google.rpc.Status` that came with it, if any."""
    reason, request_id = "", ""
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    retry_after_seconds: float | None = None
    status = status_pb2.Status.FromString(status_bytes) if status_bytes else status_pb2.Status()
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        bad_request = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        request_info = error_details_pb2.RequestInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad_request):
            violations += [
                FieldViolation(field=v.field, description=v.description) for v in bad_request.field_violations
            ]
        elif detail.Unpack(retry):
            retry_after_seconds = retry.retry_delay.ToTimedelta().total_seconds()
        elif detail.Unpack(request_info):
            request_id = request_info.request_id
    return _CLASS_BY_CODE.get(code, ServiceDefect)(
        message,
        reason=reason,
        code=code,
        metadata=metadata,
        field_violations=tuple(violations),
        retry_after_seconds=retry_after_seconds,
        request_id=request_id or metadata.get("request_id", ""),
    )


def client_closed() -> CallCancelled:
    """The error for a call of a client that is closed."""
    return CallCancelled("the client is closed", code=grpc.StatusCode.CANCELLED)


def error_from_sync(error: grpc.RpcError) -> TunesmithError:
    """The typed error for what a blocking call raised."""
    code = error.code()
    pairs = [(pair.key, pair.value) for pair in error.trailing_metadata() or ()]
    return error_from_parts(code, error.details() or code.name, _status_bytes(pairs))


def error_from_aio(error: grpc.aio.AioRpcError) -> TunesmithError:
    """The typed error for what an asyncio call raised."""
    code = error.code()
    return error_from_parts(code, error.details() or code.name, _status_bytes(error.trailing_metadata() or ()))


def _status_bytes(pairs: Iterable[tuple[str, str | bytes]]) -> bytes | None:
    for key, value in pairs:
        if key == _STATUS_KEY and isinstance(value, bytes):
            return value
    return None
