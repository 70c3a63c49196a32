"""A stop that is being carried out: its mode, its deadline on the monotonic clock, and the memory it started from.

Refuses to be loosened: asking again never moves the deadline back, and a cancel stays a cancel.
"""

from __future__ import annotations

import time


class Stop:
    """From the request to the last process' end."""

    def __init__(self, *, mode: str, grace_seconds: float) -> None:
        self.mode = mode
        self._started = time.monotonic()
        self.deadline = self._started + grace_seconds
        # True once the grace was over and the engine was killed for it.
        self.killed = False
        self._highest_bytes = 0

    def tighten(self, *, mode: str, grace_seconds: float) -> bool:
        """Take a further request; True when the engine must hear of it because the mode became a cancel."""
        self.deadline = min(self.deadline, time.monotonic() + grace_seconds)
        became_cancel = mode == "cancel" and self.mode != "cancel"
        if became_cancel:
            self.mode = mode
        return became_cancel

    def postpone(self, seconds: float) -> None:
        """The machine stood still for so long, and the engine with it."""
        self.deadline += seconds

    def measure(self, resident_bytes: int) -> None:
        """Note the resident memory of the whole tree; the highest counts."""
        self._highest_bytes = max(self._highest_bytes, resident_bytes)

    def freed_bytes(self, resident_bytes: int) -> int:
        """What the end gave back, given what is resident after it."""
        return max(0, self._highest_bytes - resident_bytes)

    def seconds(self) -> float:
        return time.monotonic() - self._started
