"""An asyncio event loop whose time is virtual: when nothing is ready, it is the time of the next timer at once.

No socket, no thread, no sleep: what runs on it is decided by its own order alone. Refuses to wait for what can never
come.
"""

from __future__ import annotations

import asyncio
from typing import Any

# Rounds of the loop in which no time passes; more is a task that never waits.
_MAX_ROUNDS_AT_ONE_TIME = 20_000


class NothingWillHappen(RuntimeError):
    """Everything waits and no timer is left, a deadlock; or something runs without end and no time passes."""


class _NoSelector:
    """Stands where a loop has its selector; waiting is moving the time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._num_rounds = 0

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise NothingWillHappen(f"everything waits for ever at {self._loop.time():.3f} s")
        self._num_rounds += 1
        # Whatever runs takes a moment: no time is so short that it never passes.
        self._loop.pass_time(max(timeout, 1e-7))
        if timeout > 0:
            self._num_rounds = 0
        if self._num_rounds > _MAX_ROUNDS_AT_ONE_TIME:
            self._num_rounds = 0
            raise NothingWillHappen(f"without end at {self._loop.time():.3f} s: {self._loop.busiest()}")
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """Begins at 0 s."""

    def __init__(self) -> None:
        super().__init__()
        self._now_seconds = 0.0
        # Of it, the time in which nothing could run.
        self.stopped_seconds = 0.0
        # What `BaseEventLoop` asks for and waits with.
        self._selector = _NoSelector(self)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_seconds

    def busiest(self) -> str:
        """Tasks that wait for something that is done already."""
        tasks = asyncio.all_tasks(self)
        return "; ".join(repr(task)[:400] for task in tasks if "finished" in repr(task._fut_waiter))  # type: ignore[attr-defined]

    def pass_time(self, seconds: float) -> None:
        """It is later; timers that are due run next."""
        self._now_seconds += seconds

    def stall(self, seconds: float) -> None:
        """Lets time pass in which nothing runs, as in a process that was stopped."""
        self.pass_time(seconds)
        self.stopped_seconds += seconds

    def _process_events(self, event_list: list[Any]) -> None:
        return None

    def _write_to_self(self) -> None:
        return None
