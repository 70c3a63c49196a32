"""How long the engine has made no progress with what it has in hand, and when that is a hang.

Progress is what the engine says while it works: steps, passes, batches, bytes that were read, rows that were planned,
tokens. Refuses to count heartbeats: nothing in an engine says anything because time went by.
"""

from __future__ import annotations

from dataclasses import dataclass

# What was slow before may be slow again: a phase may pause for so many times its longest pause so far.
_TIMES_LONGEST_PAUSE = 20.0
# A look that comes later than it was due by more than this finds that the shim itself did not run: it was stopped, or
# the machine was. The engine may not have run either.
_OVERSLEPT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """An engine that was found to hang."""

    idle_seconds: float
    limit_seconds: float
    # What its processes were doing, for people.
    stacks: str


class HangClock:
    """Stands still until there is work in hand. All times are the caller's monotonic seconds."""

    def __init__(self, *, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._last_progress: float | None = None
        self._longest_pause = 0.0
        self._due: float | None = None

    def begin(self, now: float) -> None:
        """There is work, or other work than before: its pauses are not those of what was before."""
        self._last_progress, self._longest_pause = now, 0.0

    def end(self) -> None:
        """There is no work any more."""
        self._last_progress = None

    def note_progress(self, now: float) -> None:
        if self._last_progress is not None:
            self._longest_pause = max(self._longest_pause, now - self._last_progress)
            self._last_progress = now

    @property
    def limit_seconds(self) -> float:
        return max(self._limit_seconds, _TIMES_LONGEST_PAUSE * self._longest_pause)

    @property
    def deadline(self) -> float | None:
        """When it is a hang unless there is progress before; None without work."""
        return None if self._last_progress is None else self._last_progress + self.limit_seconds

    def idle_seconds(self, now: float) -> float:
        return 0.0 if self._last_progress is None else now - self._last_progress

    def sleep_until(self, due: float) -> None:
        """The caller looks again at `due` at the latest."""
        self._due = due

    def wake_up(self, now: float) -> None:
        """The caller looks again. Time in which it did not run itself is left out."""
        if self._due is not None and self._last_progress is not None and now - self._due > _OVERSLEPT_SECONDS:
            self._last_progress = min(now, self._last_progress + now - self._due)

    def is_over(self, now: float) -> bool:
        """Whether the limit has passed without progress."""
        return self.deadline is not None and now >= self.deadline
