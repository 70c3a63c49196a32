"""Decides whether an attempt may start, given what this node knows of the job. Pure; whoever calls it persists."""

from __future__ import annotations

from enum import Enum, auto

from gpu_service.domain.errors import Fault, Refusal


class Admission(Enum):
    """What StartRun amounts to."""

    # The attempt is here already, with the same spec: nothing changes.
    SAME_RUN = auto()
    # New to this node; every older attempt of the job is stopped before it starts.
    NEW_RUN = auto()


def admit(*, attempt: int, spec_digest: str, highest_attempt: int, known_digest: str | None) -> Admission:
    """`highest_attempt` is the highest ever persisted for the job (0: none); `known_digest` that of this very attempt,
    None when it is not here (never was, or was released).

    Raises `Refusal` STALE_EPOCH for an attempt below the highest, or a released one; RUN_CONFLICT for another digest.
    """
    if known_digest is not None and attempt == highest_attempt:
        if known_digest == spec_digest:
            return Admission.SAME_RUN
        raise Refusal(
            "RUN_CONFLICT",
            Fault.PLATFORM,
            f"attempt {attempt} exists here with another spec",
            details={"known_spec_digest": known_digest},
        )
    if attempt <= highest_attempt:
        raise Refusal(
            "STALE_EPOCH",
            Fault.PLATFORM,
            f"attempt {attempt} is over: this node knows attempt {highest_attempt}",
            details={"highest_attempt": str(highest_attempt)},
        )
    return Admission.NEW_RUN
