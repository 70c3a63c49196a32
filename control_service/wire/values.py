"""Translates the small values: enums by name, times, failures, files by content. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from control_service.domain.artifact import FileReference
from control_service.domain.failure import Failure, Fault
from tunesmith.common.v1 import errors_pb2, file_pb2

if TYPE_CHECKING:
    # The name exists in the type stubs only.
    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper

V = TypeVar("V", bound=int)

_UNSPECIFIED = "UNSPECIFIED"


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@cache
def _prefix(enum: _EnumTypeWrapper[V]) -> str:
    """`JOB_STATE_` of JobState: every enum of the contract starts with `<PREFIX>UNSPECIFIED` (buf lint holds it)."""
    return str(enum.DESCRIPTOR.values[0].name).removesuffix(_UNSPECIFIED)


@lru_cache(maxsize=1024)
def enum_number(enum: _EnumTypeWrapper[V], name: str) -> V:
    """The number of a domain name (`QUEUED`); a name that the contract does not have is a ValueError."""
    return enum.Value(_prefix(enum) + name)


@lru_cache(maxsize=1024)
def enum_name(enum: _EnumTypeWrapper[V], number: int) -> str:
    """The domain name of a number; `UNSPECIFIED` for one that this version does not know."""
    value = enum.DESCRIPTOR.values_by_number.get(number)
    return _UNSPECIFIED if value is None else str(value.name).removeprefix(_prefix(enum))


def timestamp(time: datetime | None) -> Timestamp | None:
    """A time for the wire; None stays unset."""
    if time is None:
        return None
    since = time - _EPOCH
    return Timestamp(seconds=since.days * 86400 + since.seconds, nanos=since.microseconds * 1000)


def utc_time(message: Timestamp) -> datetime:
    """A time from the wire, aware, in UTC, to the microsecond."""
    return _EPOCH + timedelta(seconds=message.seconds, microseconds=message.nanos // 1000)


def failure_message(failure: Failure | None) -> errors_pb2.Failure | None:
    """A failure for the wire. A reason that the contract does not have travels in details, by name."""
    if failure is None:
        return None
    message = errors_pb2.Failure(
        fault=enum_number(errors_pb2.Fault, failure.fault.value),
        message=failure.message,
        stage=failure.stage,
        exception_type=failure.exception_type,
        file=failure.file,
        versions=failure.versions,
        exit_status=failure.exit_status,
        signal=failure.signal,
        details=failure.details,
    )
    name = _prefix(errors_pb2.ErrorReason) + failure.reason
    if name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name:
        message.reason = errors_pb2.ErrorReason.Value(name)
    else:
        message.details["reason"] = failure.reason
    return message


def failure_value(message: errors_pb2.Failure) -> Failure:
    """A failure from the wire."""
    return Failure(
        reason=enum_name(errors_pb2.ErrorReason, message.reason),
        fault=Fault(enum_name(errors_pb2.Fault, message.fault)),
        message=message.message,
        stage=message.stage,
        exception_type=message.exception_type,
        file=message.file,
        versions=dict(message.versions),
        exit_status=message.exit_status if message.HasField("exit_status") else None,
        signal=message.signal if message.HasField("signal") else None,
        details=dict(message.details),
    )


def file_messages(files: Iterable[FileReference]) -> list[file_pb2.FileReference]:
    """Files by content for the wire."""
    return [file_pb2.FileReference(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes) for file in files]


def file_values(messages: Iterable[file_pb2.FileReference]) -> tuple[FileReference, ...]:
    """Files by content from the wire."""
    return tuple(FileReference(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes) for file in messages)
