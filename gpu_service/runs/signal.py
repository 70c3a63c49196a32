"""A wake-up that any number of tasks wait for and that keeps no queue. Refuses to carry data: waiters look for
themselves.
"""

from __future__ import annotations

import asyncio


class Signal:
    """`fire` wakes all who wait. Take `current()` before looking, so that a change in between is not missed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        event, self._event = self._event, asyncio.Event()
        event.set()

    def current(self) -> asyncio.Event:
        return self._event


async def wait_for(event: asyncio.Event, timeout_seconds: float) -> None:
    """Wait until the event is set or the time is over."""
    try:
        async with asyncio.timeout(timeout_seconds):
            await event.wait()
    except TimeoutError:
        return
