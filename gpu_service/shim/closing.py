"""Closes the journal of a run whose engine is gone, with the one terminal event that its end amounts to.

Refuses to touch a journal that says already how its run ended: what was recorded as the outcome is the outcome.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gpu_service.journal import STEPS_LOST, JournalFull, Writer, events, summarize
from gpu_service.journal.failpoints import failpoint
from gpu_service.shim import durable_json
from gpu_service.shim.records import ExitRecord
from gpu_service.shim.stacks import CURRENT_THREAD
from tunesmith.common.v1 import errors_pb2, event_pb2

# Code of the warning in a job's log.
DEVICE_QUARANTINED = "device-quarantined"
_MAX_LINES = 150
# Of the stacks in a failure; more of them is in the job's log.
_MAX_DETAIL_CHARACTERS = 2000


def settle(directory: Path, ending: ExitRecord, log: Callable[..., None]) -> int | None:
    """Put the end of the engine of `directory` on record, then close its run, as `close_run` does, if it has one."""
    failpoint("shim.before-exit-record")
    try:
        ending.write(directory)
    except OSError as error:
        # A full disk: the run's journal has room of its own, and is what counts. The server buries what is left.
        log("no-exit-record", error=str(error))
    failpoint("shim.after-exit-record")
    log("ended", status=ending.status, signal=ending.signal, held_bytes=ending.held_bytes)
    if ending.run_directory is None:
        return None
    sequence = close_run(Path(ending.run_directory), ending)
    failpoint("shim.after-close")
    return sequence


def has_begun(run_directory: Path) -> bool:
    """Whether any engine said anything of the run."""
    return summarize(run_directory / "journal").last_run_sequence > 0


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
        _tell(writer, ending)
        state, failure = _outcome(ending, phase=phase, nothing_lost=nothing_lost)
        if state == event_pb2.RUN_STATE_INTERRUPTED and summary.last_checkpoint is not None:
            message = (
                "the engine ended before it wrote the checkpoint that it was stopped for: "
                f"what was trained after step {summary.last_checkpoint.step} is lost"
            )
            with suppress(JournalFull):
                writer.append(events.wrap(event_pb2.WarningEvent(code=STEPS_LOST, message=message)))
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


def _tell(writer: Writer, ending: ExitRecord) -> None:
    """What people want to know of the end beyond its reason. A full disk keeps room for the closing events only."""
    with suppress(JournalFull):
        if ending.stacks:
            what = "hung" if ending.idle_seconds else "crashed"
            lines = [f"the engine {what}; what its processes were doing:", *ending.stacks.splitlines()]
            for line in filter(str.strip, lines[:_MAX_LINES]):
                text = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in line)
                writer.append(events.wrap(event_pb2.LogEvent(level="error", message=text)))
        if ending.held_bytes:
            writer.append(
                events.wrap(
                    event_pb2.WarningEvent(
                        code=DEVICE_QUARANTINED,
                        message=f"{describe_held(ending.held_bytes)}; the device takes no run until it is",
                    )
                )
            )


def _most_telling(stacks: str) -> str:
    """The thread that took the signal, as a rule the one that trains, and what follows; else from the beginning."""
    start = max(0, stacks.find(CURRENT_THREAD))
    return stacks[start : start + _MAX_DETAIL_CHARACTERS]


def describe_held(held_bytes: int) -> str:
    """Why a device is not to be used."""
    return f"{held_bytes / 1024**2:.0f} MiB of the device's memory are not free although its engine is gone"


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
    if ending.idle_seconds:
        return events.failure(
            reason="HANG",
            fault="PLATFORM",
            message=f"no progress for {ending.idle_seconds:.0f} s; the limit is {ending.hang_limit_seconds:.0f} s, "
            "the engine was killed",
            stage=phase,
            details={
                "idle_seconds": f"{ending.idle_seconds:.1f}",
                "limit_seconds": f"{ending.hang_limit_seconds:.1f}",
                "stacks": _most_telling(ending.stacks),
            },
            signal=ending.signal,
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
            details={"stacks": _most_telling(ending.stacks)} if ending.stacks else None,
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
