"""The refusal: one typed error for everything that is turned down before or during planning. Knows no wire format."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Fault(StrEnum):
    """Whose trouble it is; the names are those of the `Fault` enum on the wire, without its prefix."""

    USER = "USER"
    PLATFORM = "PLATFORM"
    HARDWARE = "HARDWARE"


class Refusal(Exception):
    """Something was refused, for a reason that a program can read.

    `reason` is a name of the wire's `ErrorReason` without its prefix (`MIX_INFEASIBLE`). `stage` is the loading stage
    (`CONFIG`, `TOKENIZER`, `WEIGHTS`, ...) or phase (`PLANNING`) it concerns, empty if neither. `field` is the path of
    the spec's field at fault (`hyperparameters.lora.rank`), empty if none. `file` is relative to its root. `details`
    are machine-readable strings by name.
    """

    def __init__(
        self,
        reason: str,
        fault: Fault,
        message: str,
        stage: str = "",
        field: str = "",
        details: Mapping[str, str] | None = None,
        *,
        exception_type: str = "",
        file: str = "",
    ) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.fault = fault
        self.message = message
        self.stage = stage
        self.field = field
        self.details = dict(details or {})
        self.exception_type = exception_type
        self.file = file

    def to_failure(self) -> dict[str, Any]:
        """The `failure` object of the planner's `refused` line; `field` travels in `details`."""
        details = {**self.details, "field": self.field} if self.field else dict(self.details)
        return {
            "reason": self.reason,
            "fault": self.fault.value,
            "message": self.message,
            "stage": self.stage,
            "exception_type": self.exception_type,
            "file": self.file,
            "details": details,
        }

    @classmethod
    def from_failure(cls, failure: Mapping[str, Any]) -> "Refusal":
        """The inverse of `to_failure`. Raises `KeyError` or `ValueError` when it is not one."""
        details = dict(failure.get("details", {}))
        field = details.pop("field", "")
        return cls(
            failure["reason"],
            Fault(failure["fault"]),
            failure["message"],
            failure.get("stage", ""),
            field,
            details,
            exception_type=failure.get("exception_type", ""),
            file=failure.get("file", ""),
        )


def refuse_user(reason: str, message: str, *, field: str = "", stage: str = "", **details: object) -> Refusal:
    """A refusal that the user can cure by changing the request, its data or its model."""
    return Refusal(reason, Fault.USER, message, stage, field, {name: str(value) for name, value in details.items()})
