"""The machine's clock as the `Clock` port, and ULIDs made from it."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

from control_service.domain.ids import UlidSource


class SystemClock:
    """Implements `app.ports.Clock`."""

    def __init__(self) -> None:
        self._began = datetime.now(UTC)
        self._began_seconds = time.monotonic()

    def utc_now(self) -> datetime:
        """The time of day, aware, in UTC."""
        return datetime.now(UTC)

    def steady_utc_now(self) -> datetime:
        """See the port."""
        return self._began + timedelta(seconds=time.monotonic() - self._began_seconds)

    def monotonic_seconds(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)


def system_ids(*, newest: str = "") -> UlidSource:
    """ULIDs by the machine's clock, above the newest that an earlier process gave out."""
    return UlidSource(lambda: time.time_ns() // 1_000_000, newest=newest)
