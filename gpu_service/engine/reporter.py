"""Writes a run's events: each goes to the journal first, then a notice goes down the pipe.

Remembers the phase and the loading stage in hand, so that whoever ends the run can say where. Encodes nothing itself
and keeps no history.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_service.journal import JournalFull, Writer
from gpu_service.journal.events import EventMessage, wrap
from tunesmith.common.v1 import errors_pb2, event_pb2

Notify = Callable[[dict[str, Any]], None]
DISK_FULL = "disk-full"


class Reporter:
    """The one voice of a run. The training thread's, but for `emit` and `warn`, which any thread may call."""

    def __init__(self, *, run_directory: Path, writer: Writer, notify: Notify) -> None:
        self._run_directory = str(run_directory)
        self._writer = writer
        self._notify = notify
        self._state: event_pb2.RunState.ValueType = event_pb2.RUN_STATE_ACCEPTED
        self._phase = ""
        # Set by the loading table while a stage is in hand.
        self.loading_stage = ""
        # Waits for room, or raises, when the disk has none for an event; None: JournalFull is the caller's to meet.
        self.when_full: Callable[[], None] | None = None

    @property
    def phase(self) -> str:
        """Name of the phase in hand, e.g. `LOADING`; empty before the first."""
        return self._phase

    def emit(self, message: EventMessage) -> None:
        """Append one event, as soon as there is room for it. Raises JournalFull, OSError, and what `when_full` does."""
        start, waited = time.monotonic(), False
        while True:
            try:
                sequence = self._writer.append(wrap(message))
                break
            except JournalFull:
                if self.when_full is None:
                    raise
                waited = True
                self.when_full()
        # Says that there is something to read: two that overtake each other do no harm.
        self._notify({"type": "journal", "run_directory": self._run_directory, "run_sequence": sequence})
        if waited:
            seconds = time.monotonic() - start
            self.warn(DISK_FULL, f"training stood still for {seconds:.0f} s: the disk had no room for its events")

    def enter_phase(self, name: str) -> None:
        """Report that the run is now doing `name` (an enum name without its prefix)."""
        self._phase = name
        self.emit(event_pb2.PhaseEvent(phase=event_pb2.Phase.Value(f"PHASE_{name}")))
        self._notify({"type": "phase", "run_directory": self._run_directory, "phase": name})

    def enter_state(self, state: event_pb2.RunState.ValueType, failure: errors_pb2.Failure | None = None) -> None:
        """Report that the run's state is now `state`."""
        self.emit(event_pb2.RunStateEvent(previous_state=self._state, state=state, failure=failure))
        self._state = state

    def enter_stopping(self) -> None:
        """Report that a stop is being carried out, once."""
        if self._state == event_pb2.RUN_STATE_RUNNING:
            self.enter_state(event_pb2.RUN_STATE_STOPPING)

    def warn(self, code: str, message: str, *, trait_type: str = "", dataset_id: int = 0) -> None:
        """Report something worth knowing that stops nothing; of one trait or dataset, if they are given."""
        self.emit(event_pb2.WarningEvent(code=code, message=message, trait_type=trait_type, dataset_id=dataset_id))
