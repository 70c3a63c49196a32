"""The one table of how the domain's errors travel: status code, google.rpc details, request id. Words none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from control_service.domain.errors import (
    Aborted,
    AlreadyExists,
    DeadlineTooShort,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    StoreFull,
    TunesmithError,
    Unavailable,
)

ERROR_DOMAIN: Final = "tunesmith"
REQUEST_ID_KEY: Final = "x-request-id"
STATUS_DETAILS_KEY: Final = "grpc-status-details-bin"

# Trailers above 8 KiB break the call itself, and they travel in base 64; so what an error carries is cut and says so.
MAX_MESSAGE_BYTES: Final = 512
MAX_METADATA_BYTES: Final = 1536
MAX_VIOLATIONS_BYTES: Final = 1536
MAX_FIELD_BYTES: Final = 256
_CUT: Final = "..."


STATUS_CODES: Final[Mapping[type[TunesmithError], grpc.StatusCode]] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    Aborted: grpc.StatusCode.ABORTED,
    OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    StoreFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Internal: grpc.StatusCode.INTERNAL,
    DeadlineTooShort: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def status_code(error: TunesmithError) -> grpc.StatusCode:
    """The code of an error; INTERNAL for a class that the table does not have."""
    return STATUS_CODES.get(type(error), grpc.StatusCode.INTERNAL)


def internal_error(request_id: str) -> Internal:
    """What a client is told of a defect: nothing but where to look."""
    return Internal("INTERNAL", f"a defect of the service; its log has the request id {request_id}")


def trailing_metadata(error: TunesmithError, *, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
    """The trailers of an error: google.rpc.Status with ErrorInfo, BadRequest, RetryInfo, RequestInfo; and its id."""
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=_cut_metadata(error.details))
    ]
    if error.violations:
        details.append(error_details_pb2.BadRequest(field_violations=_cut_violations(error.violations)))
    if error.retry_after_seconds is not None:
        delay = Duration()
        delay.FromMilliseconds(int(error.retry_after_seconds * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    details.append(error_details_pb2.RequestInfo(request_id=request_id))
    status = status_pb2.Status(code=status_code(error).value[0], message=status_message(error))
    for detail in details:
        status.details.add().Pack(detail)
    return ((STATUS_DETAILS_KEY, status.SerializeToString()), (REQUEST_ID_KEY, request_id))


def status_message(error: TunesmithError) -> str:
    """The error's message, cut to what a trailer can carry."""
    return _cut(error.message, MAX_MESSAGE_BYTES)


def _cut(text: str, size_bytes: int) -> str:
    encoded = text.encode(errors="replace")
    if len(encoded) <= size_bytes:
        return text
    return encoded[: max(0, size_bytes - len(_CUT))].decode(errors="ignore") + _CUT


def _cut_metadata(details: Mapping[str, str]) -> dict[str, str]:
    kept: dict[str, str] = {}
    room = MAX_METADATA_BYTES
    for key, value in details.items():
        room -= len(key.encode())
        if room <= len(_CUT):
            break
        kept[key] = _cut(str(value), room)
        room -= len(kept[key].encode())
    return kept


def _cut_violations(violations: Iterable[FieldViolation]) -> list[Any]:
    kept: list[Any] = []
    room = MAX_VIOLATIONS_BYTES
    for violation in violations:
        field, description = _cut(violation.field, MAX_FIELD_BYTES), _cut(violation.description, MAX_FIELD_BYTES)
        room -= len(field.encode()) + len(description.encode())
        if room < 0:
            break
        kept.append(error_details_pb2.BadRequest.FieldViolation(field=field, description=description))
    return kept
