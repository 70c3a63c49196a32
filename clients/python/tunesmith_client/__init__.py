"""Tunesmith's client: `Client` and `AsyncClient` over the generated stubs, with typed errors, watches that reconnect.

Messages are the generated ones (`tunesmith.control.v1`, `tunesmith.common.v1`). What is not named here is private.
"""

from tunesmith_client._aio import AsyncClient
from tunesmith_client._config import ClientConfig, RetryPolicy
from tunesmith_client._errors import (
    Aborted,
    AccessDenied,
    AlreadyExists,
    CallCancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    JobFailed,
    NotFound,
    OutOfRange,
    Refused,
    ResourceExhausted,
    ServiceDefect,
    TransferDamaged,
    TunesmithError,
    Unavailable,
)
from tunesmith_client._generation import Answer, SamplingOptions
from tunesmith_client._outcome import TERMINAL_STATES, reason_name, state_name
from tunesmith_client._sync import Client
from tunesmith_client._transfer import TransferProgress
from tunesmith_client._watch import Watch

__all__ = [
    "TERMINAL_STATES",
    "Aborted",
    "AccessDenied",
    "AlreadyExists",
    "Answer",
    "AsyncClient",
    "CallCancelled",
    "Client",
    "ClientConfig",
    "DeadlineExceeded",
    "FailedPrecondition",
    "FieldViolation",
    "InvalidArgument",
    "JobFailed",
    "NotFound",
    "OutOfRange",
    "Refused",
    "ResourceExhausted",
    "RetryPolicy",
    "SamplingOptions",
    "ServiceDefect",
    "TransferDamaged",
    "TransferProgress",
    "TunesmithError",
    "Unavailable",
    "Watch",
    "reason_name",
    "state_name",
]
