"""Turns a failed call to a node into the domain's error: by status code and ErrorInfo, never by parsing text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
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
    TunesmithError,
    Unavailable,
)

ERROR_DOMAIN: Final = "tunesmith"
_STATUS_DETAILS: Final = "grpc-status-details-bin"

_DETAIL_KINDS: Final[Mapping[str, Any]] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
}

# What a node refused with -> what control raises. Codes that are no refusal of ours are below.
_REFUSALS: Final[Mapping[grpc.StatusCode, type[TunesmithError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.INTERNAL: Internal,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineTooShort,
}

# The connection or the process behind it is at fault; the call may have reached the node or not.
_LOST: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNKNOWN,
    }
)


def domain_error(error: grpc.aio.AioRpcError, *, node: str) -> TunesmithError:
    """The domain's error for a failed call to `node`; its details name the node."""
    details = _details(error)
    info = details.get("ErrorInfo")
    refusal = _REFUSALS.get(error.code())
    if refusal is not None and info is not None and info.domain == ERROR_DOMAIN:
        violations = details["BadRequest"].field_violations if "BadRequest" in details else ()
        delay = details["RetryInfo"].retry_delay if "RetryInfo" in details else None
        return refusal(
            info.reason,
            error.details() or info.reason,
            details={**info.metadata, "node": node},
            violations=tuple(FieldViolation(violation.field, violation.description) for violation in violations),
            retry_after_seconds=None if delay is None else delay.ToTimedelta().total_seconds(),
        )
    message = f"node {node}: {error.code().name}: {error.details()}"
    if error.code() in _LOST:
        return Unavailable("NODE_UNREACHABLE", message, details={"node": node}, retry_after_seconds=1.0)
    # A code without our ErrorInfo comes from something that is not a node of ours, or from its defect.
    return Internal("INTERNAL", message, details={"node": node})


def _details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in error.trailing_metadata() or ():
        if key != _STATUS_DETAILS or not isinstance(value, bytes):
            continue
        try:
            for detail in status_pb2.Status.FromString(value).details:
                kind = _DETAIL_KINDS.get(detail.TypeName())
                if kind is not None:
                    message = kind()
                    detail.Unpack(message)
                    found[kind.DESCRIPTOR.name] = message
        except DecodeError:
            # A trailer that cannot be read says nothing; the code and the message still stand.
            return {}
    return found
