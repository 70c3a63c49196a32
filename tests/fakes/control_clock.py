"""A clock that moves when it is told to."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta


class FakeClock:
    """Implements `Clock`; `advance` wakes the sleepers whose time has come."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def utc_now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self._seconds)

    def steady_utc_now(self) -> datetime:
        return self.utc_now()

    def monotonic_seconds(self) -> float:
        return self._seconds

    async def sleep(self, seconds: float) -> None:
        wakes: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._seconds + seconds, wakes))
        await wakes

    async def pass_time(self, seconds: float) -> None:
        """Advances second by second, as for a process that runs; `advance` alone is as for one that was stopped."""
        while seconds > 0:
            self.advance(min(1.0, seconds))
            seconds -= 1.0
            for _ in range(3):
                await asyncio.sleep(0)

    def advance(self, seconds: float) -> None:
        self._seconds += seconds
        due = [sleeper for sleeper in self._sleepers if sleeper[0] <= self._seconds]
        self._sleepers = [sleeper for sleeper in self._sleepers if sleeper[0] > self._seconds]
        for _, wakes in due:
            if not wakes.done():
                wakes.set_result(None)
