"""The machine's clock as the `Clock` port, and ULIDs made from it."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

from control_service.domain.ids import UlidSource


class SystemClock:
    """Implements `app.ports.Clock`."""

    def utc_now(self) -> datetime:
        """The time of day, aware, in UTC."""
        return datetime.now(UTC)

    def monotonic_seconds(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)


def system_ids() -> UlidSource:
    """ULIDs by the machine's clock."""
    return UlidSource(lambda: time.time_ns() // 1_000_000)
