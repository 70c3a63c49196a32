"""A typed failure of a run or a job: attributes, not text. Mirrors `tunesmith.common.v1.Failure`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Fault(StrEnum):
    """Whose trouble a failure is."""

    UNSPECIFIED = "UNSPECIFIED"
    USER = "USER"
    PLATFORM = "PLATFORM"
    HARDWARE = "HARDWARE"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failure. `reason` is an ErrorReason name without its prefix; the other fields are as in the proto."""

    reason: str
    fault: Fault
    message: str = ""
    stage: str = ""
    exception_type: str = ""
    file: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    exit_status: int | None = None
    signal: int | None = None
    details: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The failure as plain JSON, as the database keeps it."""
        return {
            "reason": self.reason,
            "fault": self.fault.value,
            "message": self.message,
            "stage": self.stage,
            "exception_type": self.exception_type,
            "file": self.file,
            "versions": dict(self.versions),
            "exit_status": self.exit_status,
            "signal": self.signal,
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Failure:
        """Reads what `to_json` wrote."""
        return cls(**{**value, "fault": Fault(value["fault"])})
