"""Devices that are not to be used, because what an ended or killed engine held of them is not free.

Looks again and again, and lifts a quarantine when its reason is gone; nothing of it survives the server, whose next one
finds out anew. Refuses to touch the device.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    reason: str
    # Called in a thread; whether the device may be used again.
    is_free: Callable[[], bool]


class Quarantine:
    """`changed` is called when a device comes under quarantine or out of it."""

    def __init__(self) -> None:
        self.changed: Callable[[], None] = lambda: None
        self._held: dict[str, _Held] = {}

    def reason(self, device_id: str) -> str:
        """Why the device is not to be used; empty when it is."""
        held = self._held.get(device_id)
        return held.reason if held is not None else ""

    def impose(self, device_id: str, reason: str, is_free: Callable[[], bool]) -> None:
        """Until `is_free`, which is asked at every `look`. A further reason replaces the first."""
        if self.reason(device_id) != reason:
            self._held[device_id] = _Held(reason=reason, is_free=is_free)
            _log.error("device-quarantined", device=device_id, reason=reason)
            self.changed()

    def lift(self, device_id: str) -> None:
        if self._held.pop(device_id, None) is not None:
            _log.info("device-released", device=device_id)
            self.changed()

    async def look(self) -> None:
        """Lift what need not be any more."""
        for device_id, held in list(self._held.items()):
            if await asyncio.to_thread(held.is_free) and self._held.get(device_id) is held:
                self.lift(device_id)
