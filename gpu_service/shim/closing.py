"""Closes the journal of a run whose engine is gone, with the one terminal event that its end amounts to.

Refuses to touch a journal that says already how its run ended: what was recorded as the outcome is the outcome.
"""

from __future__ import annotations

import signal
from pathlib import Path

from gpu_service.journal import Writer, events, summarize
from gpu_service.shim import durable_json
from gpu_service.shim.records import ExitRecord
from tunesmith.common.v1 import errors_pb2, event_pb2


def close_run(run_directory: Path, ending: ExitRecord) -> int | None:
    """Append the missing end; gives the newest run sequence, or None when the run was over already.

    Nothing of the run may live any more. Raises JournalLocked, OSError, ValueError for a broken `run.json`.
    """
    specification = durable_json.read(run_directory / "run.json")
    if specification is None:
        raise ValueError(f"{run_directory} has no run.json")
    with Writer.open(run_directory / "journal", int(specification["attempt"])) as writer:
        summary = summarize(run_directory / "journal")
        if summary.is_over:
            return None
        phase = event_pb2.Phase.Name(summary.phase).removeprefix("PHASE_") if summary.phase else ""
        # A run that no engine ever began has nothing that a checkpoint would have kept.
        nothing_lost = bool(summary.checkpoints) or summary.last_run_sequence == 0
        state, failure = _outcome(ending, phase=phase, nothing_lost=nothing_lost)
        if ending.stop_mode is not None:
            writer.append(
                events.wrap(
                    event_pb2.MemoryReleasedEvent(
                        freed_bytes=ending.freed_bytes, resident_bytes=0, seconds=ending.seconds, engine_ended=True
                    )
                )
            )
        return writer.append(
            events.wrap(event_pb2.RunStateEvent(previous_state=summary.state, state=state, failure=failure))
        )


def _outcome(
    ending: ExitRecord, *, phase: str, nothing_lost: bool
) -> tuple[event_pb2.RunState.ValueType, errors_pb2.Failure | None]:
    if ending.stop_mode == "cancel":
        return event_pb2.RUN_STATE_CANCELLED, None
    if ending.stop_mode == "checkpoint" and nothing_lost:
        return event_pb2.RUN_STATE_INTERRUPTED, None
    failure = _failure(ending, phase)
    if ending.note:
        failure.message += f": {ending.note}"
    return event_pb2.RUN_STATE_FAILED, failure


def _failure(ending: ExitRecord, phase: str) -> errors_pb2.Failure:
    if ending.disk_full:
        return events.failure(
            reason="DISK_FULL", fault="PLATFORM", message="the disk had no room for an engine's files", stage=phase
        )
    if ending.out_of_memory:
        return events.failure(
            reason="HOST_OUT_OF_MEMORY",
            fault="HARDWARE",
            message="the kernel killed the engine because the machine's memory ran out",
            stage=phase,
            signal=ending.signal,
        )
    if ending.signal is not None:
        return events.failure(
            reason="ENGINE_KILLED",
            fault="PLATFORM",
            message=f"the engine process was killed by signal {ending.signal} ({signal.strsignal(ending.signal)})",
            stage=phase,
            signal=ending.signal,
        )
    if ending.status is not None:
        return events.failure(
            reason="ENGINE_EXITED",
            fault="PLATFORM",
            message=f"the engine process ended with status {ending.status} without saying why",
            stage=phase,
            exit_status=ending.status,
        )
    return events.failure(
        reason="ENGINE_LOST",
        fault="PLATFORM",
        message="the engine and its shim are gone without an exit record",
        stage=phase,
    )
