"""What happened in a schedule, line by line in virtual time, for whoever looks into a seed. Kept only if asked for."""

from __future__ import annotations

from collections.abc import Callable

from tests.fakes.control_codec import PickleCodec
from tests.faults.simulation.memory_store import Tables


class Trace:
    """Called with a line."""

    def __init__(self, *, now_seconds: Callable[[], float], codec: PickleCodec, is_kept: bool) -> None:
        self._now_seconds = now_seconds
        self._codec = codec
        self._is_kept = is_kept
        # Events of each job that have a line.
        self._num_told: dict[str, int] = {}
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        if self._is_kept:
            self.lines.append(f"{self._now_seconds():9.3f}  {line}")

    def committed(self, tables: Tables) -> None:
        """A line for every event that is new."""
        if not self._is_kept:
            return
        for job_id, events in tables.events.items():
            for event in events[self._num_told.get(job_id, 0) :]:
                fact = self._codec.decode(event.kind, event.payload)
                self(f"  log {job_id} {event.sequence} attempt {event.attempt}: {fact}"[:200])
            self._num_told[job_id] = len(events)

    def begin_anew(self, tables: Tables) -> None:
        """The logs are those of a backup."""
        self._num_told = {job_id: len(log) for job_id, log in tables.events.items()}
