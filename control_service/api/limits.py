"""Limits of time for tasks, kept by one timer for all of them: nearly every task is over long before its time is. Knows
nothing of what the tasks do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from control_service.domain.errors import TunesmithError


class TimeLimits:
    """Used on one event loop."""

    def __init__(self, end: Callable[[asyncio.Task[Any], Callable[[], TunesmithError]], None]) -> None:
        """`end` is called with a task whose time is over, and with what makes the reason."""
        self._end = end
        self._limits: dict[asyncio.Task[Any], tuple[float, Callable[[], TunesmithError]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def set(self, task: asyncio.Task[Any], seconds: float, why: Callable[[], TunesmithError]) -> None:
        """The task has so many seconds from now on, whatever it had before."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        self._limits[task] = until, why
        if self._timer is None or until < self._timer.when():
            self._wake_at(until, loop)

    def clear(self, task: asyncio.Task[Any]) -> None:
        """The task has no limit any more."""
        self._limits.pop(task, None)

    def _wake_at(self, time_seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(time_seconds, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for task, (until, why) in list(self._limits.items()):
            if until <= now:
                del self._limits[task]
                self._end(task, why)
        if self._limits:
            self._wake_at(min(until for until, _ in self._limits.values()), loop)
