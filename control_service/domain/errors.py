"""The one family of errors that the control service raises; says why, never how it travels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FieldViolation:
    """One field that breaks a rule: its path (`project.traits[0].datasets`) and what is wrong, for people."""

    field: str
    description: str


class TunesmithError(Exception):
    """Root of every refusal.

    `reason` is an ErrorReason name without its prefix and the thing to branch on; `message` is for people; `details`
    are machine-readable facts by name; `violations` name fields; `retry_after_seconds` is set when trying again helps.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        details: Mapping[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.details: Mapping[str, str] = dict(details or {})
        self.violations = violations
        self.retry_after_seconds = retry_after_seconds


class InvalidArgument(TunesmithError):
    """The request itself is wrong, whatever the state of the service."""


class NotFound(TunesmithError):
    """What the request names is not there."""


class AlreadyExists(TunesmithError):
    """What the request would make is there already, and differs."""


class FailedPrecondition(TunesmithError):
    """The state of the service must change before the request can work."""


class Aborted(TunesmithError):
    """Someone else changed the resource first; read it again."""


class OutOfRange(TunesmithError):
    """A position lies outside what is kept."""


class ResourceExhausted(TunesmithError):
    """A limit or a resource is used up."""


class Unavailable(TunesmithError):
    """Not now; the same request may work shortly."""


class StoreFull(Unavailable):
    """The database has no room for the change, which was not made; it works again once there is some."""


class DeadlineTooShort(TunesmithError):
    """The caller's time is over, or too short for the work; more time helps, trying again alone does not."""


class Internal(TunesmithError):
    """A defect of the service, met where it can be named."""


def invalid_field(field: str, description: str, *, reason: str = "INVALID_FIELD") -> InvalidArgument:
    """Makes the refusal of one field."""
    return InvalidArgument(reason, f"{field}: {description}", violations=(FieldViolation(field, description),))
