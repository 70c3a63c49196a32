"""How long the engine has made no progress with what it has in hand, and when that is a hang.

Progress is what the engine says while it works: steps, passes, batches, bytes that were read, rows that were planned,
tokens. Refuses to count heartbeats: nothing in an engine says anything because time went by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# What was slow before may be slow again: a phase may pause for so many times its longest pause so far.
_TIMES_LONGEST_PAUSE = 20.0
# But never longer than so many times the limit as it was set: one slow piece of work must not hide a hang for days.
_MOST_TIMES_LIMIT = 4.0
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
        # What the engine is about to do takes so long on a slow disk, it said.
        self._announced_seconds = 0.0
        # The caller sleeps since then, and until then at the latest.
        self._slept_from, self._due = 0.0, math.inf

    def begin(self, now: float) -> None:
        """There is work, or other work than before: its pauses are not those of what was before."""
        self._last_progress, self._longest_pause, self._announced_seconds = now, 0.0, 0.0

    def end(self) -> None:
        """There is no work any more."""
        self._last_progress = None

    def note_progress(self, now: float, *, next_pause_seconds: float = 0.0) -> None:
        """`next_pause_seconds` are of a piece of work that has no signs in its midst: its pause comes on top of what
        is allowed, and none is judged by it.
        """
        if self._last_progress is not None:
            pause = now - self._last_progress
            self._longest_pause = max(self._longest_pause, pause if not self._announced_seconds else 0.0)
            self._last_progress, self._announced_seconds = now, next_pause_seconds

    @property
    def limit_seconds(self) -> float:
        stretched = min(_TIMES_LONGEST_PAUSE * self._longest_pause, _MOST_TIMES_LIMIT * self._limit_seconds)
        return max(self._limit_seconds, stretched) + self._announced_seconds

    @property
    def deadline(self) -> float | None:
        """When it is a hang unless there is progress before; None without work."""
        return None if self._last_progress is None else self._last_progress + self.limit_seconds

    def idle_seconds(self, now: float) -> float:
        return 0.0 if self._last_progress is None else now - self._last_progress

    def sleep_until(self, due: float, now: float) -> None:
        """The caller looks again at `due` at the latest."""
        self._slept_from, self._due = now, due

    def wake_up(self, now: float) -> float:
        """The caller looks again; gives the seconds in which it did not run although it should have.

        A sleep with such an end is left out from its beginning: nobody knows when in it the machine stood still, and
        what woke up with the caller must have time to say something.
        """
        late_seconds = now - self._due
        if late_seconds <= _OVERSLEPT_SECONDS:
            return 0.0
        if self._last_progress is not None:
            self._last_progress = min(now, self._last_progress + now - self._slept_from)
        return late_seconds

    def is_over(self, now: float) -> bool:
        """Whether the limit has passed without progress."""
        return self.deadline is not None and now >= self.deadline
