"""Which failures of a run are tried again, and after how long. Reads types, never texts."""

from __future__ import annotations

from dataclasses import replace

from control_service.domain.failure import Failure, Fault

# A process or machine that ended, or bytes that did not arrive: another attempt may well go through. An exception in
# the training loop or a plan that does not fit comes again in the same way, so it is not tried again.
RETRIED_REASONS: frozenset[str] = frozenset(
    {
        "ENGINE_KILLED",
        "ENGINE_EXITED",
        "ENGINE_LOST",
        "HANG",
        "HOST_OUT_OF_MEMORY",
        "CHECKPOINT_WRITE",
        # The next attempt waits in the queue until a node has room for what the run leaves.
        "DISK_FULL",
        "BLOB_NOT_FOUND",
        "CHECKSUM_MISMATCH",
    }
)
# A planner names what it could not do, and would name it again; one that a signal ended was killed as an engine may be.
_PLANNING = "PLANNING"
# The node's disk gave other bytes of the checkpoint than were written: there may be a copy, or an earlier one. What
# differs in any other way, such as the probe's loss, differs again.
_DAMAGED_CHECKPOINT = "RESUME_MISMATCH"
INITIAL_BACK_OFF_SECONDS = 1.0
MAX_BACK_OFF_SECONDS = 60.0


def is_retried(failure: Failure) -> bool:
    """True for a failure that trying again may mend. What the user must change never is."""
    if failure.fault is Fault.USER:
        return False
    if failure.reason == _PLANNING:
        return failure.signal is not None
    return failure.reason in RETRIED_REASONS or bool(damaged_checkpoint(failure))


def damaged_checkpoint(failure: Failure | None) -> str:
    """Name of the checkpoint whose bytes are damaged, when that is why the run failed; else empty."""
    if failure is None or failure.reason != _DAMAGED_CHECKPOINT or failure.fault is not Fault.HARDWARE:
        return ""
    return failure.details.get("checkpoint", "")


def back_off_seconds(num_retries: int) -> float:
    """How long to wait before retry number `num_retries`, from 1."""
    return min(MAX_BACK_OFF_SECONDS, INITIAL_BACK_OFF_SECONDS * 2.0 ** (num_retries - 1))


def exhausted(failure: Failure, num_retries: int) -> Failure:
    """The last failure of a job that used up its retries, as the job's own."""
    return replace(
        failure,
        reason="RETRIES_EXHAUSTED",
        message=f"{failure.message} (all {num_retries} retries were used)",
        details={**failure.details, "last_reason": failure.reason, "num_retries": str(num_retries)},
    )


def attempt_lost(node: str) -> Failure:
    """The failure of an attempt that its node does not know any more."""
    return Failure(reason="ENGINE_LOST", fault=Fault.HARDWARE, message=f"node {node} has no record of the run")
