"""Sees that a device has an engine before a run wants one: imported, and on a GPU with its context made.

An engine without work takes the next run, whatever its base, so there is never more than one a device. Refuses to start
one where a run, a probe or a quarantine is, and to start again and again what does not come up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any

import structlog

from gpu_service.devices import Device
from gpu_service.runs.engine import Engine
from gpu_service.runs.engine_directories import EngineStartFailed, keep_context
from gpu_service.runs.engine_pool import EnginePool

_log = structlog.get_logger(__name__)
# After a spare that was lost, twice as long after each further one.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0
# No context is larger; what else was taken meanwhile is somebody else's.
_MAX_CONTEXT_BYTES = 2 << 30
# A shim comes up in less. One that does not, or cannot be buried, must not keep runs from being told to stop.
_LAST_START_SECONDS = 5.0


@dataclass(kw_only=True)
class _Place:
    """What is known of a device."""

    # What it had free before its spare came up.
    free_bytes: int = 0
    pause_seconds: float = 0.0
    not_before: float = 0.0


class SpareKeeper:
    """Asked to `look` now and then."""

    def __init__(
        self,
        *,
        pool: EnginePool,
        devices: Callable[[], Awaitable[Sequence[Device]]],
        is_free: Callable[[str], bool],
    ) -> None:
        """`is_free(device_id)`: whether neither run nor probe has the device."""
        self._pool = pool
        self._devices = devices
        self._is_free = is_free
        self._places: dict[str, _Place] = {}
        # By name; one that is wanted while another of its name is under way is not begun.
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ended = False
        pool.on_ready = self._note_ready
        pool.on_spare_lost = self._note_lost

    async def look(self) -> None:
        """Have an engine started wherever one is wanted and there is none."""
        if self._places and all(self._pool.engine_on(device_id) for device_id in self._places):
            return
        for device in await self._devices():
            if not self._pool.settings.keeps_spare(device.id):
                continue
            place = self._places.setdefault(device.id, _Place())
            name = f"spare-{device.id}"
            # One that is on its way may hold some of the device already.
            is_wanted = not (device.quarantine_reason or self._pool.engine_on(device.id) or name in self._tasks)
            if is_wanted and self._may_have_one(device.id) and time.monotonic() >= place.not_before:
                place.free_bytes = device.free_memory_bytes
                # A task of its own: it is not to be cancelled with whoever looks.
                self._spawn(self._start(device), name)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        if name in self._tasks:
            work.close()
            return
        task = self._tasks[name] = asyncio.create_task(work, name=name, context=Context())
        task.add_done_callback(lambda task: self._tasks.pop(name))

    def _may_have_one(self, device_id: str) -> bool:
        return self._is_free(device_id) and not self._ended

    async def _start(self, device: Device) -> None:
        try:
            engine = await self._pool.start_spare(device, lambda: self._may_have_one(device.id))
        except (EngineStartFailed, OSError) as error:
            _log.error("spare-not-started", device=device.id, error=str(error))
            self._pause(device.id)
            return
        if engine is not None:
            _log.info("spare-started", engine=engine.id, device=device.id)

    def _note_lost(self, engine: Engine) -> None:
        _log.warning("spare-lost", engine=engine.id, device=engine.device_id)
        self._pause(engine.device_id)

    def _pause(self, device_id: str) -> None:
        place = self._places.setdefault(device_id, _Place())
        place.pause_seconds = min(max(2 * place.pause_seconds, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
        place.not_before = time.monotonic() + place.pause_seconds

    def _note_ready(self, engine: Engine) -> None:
        place = self._places.get(engine.device_id)
        if place is not None and not engine.had_work:
            place.pause_seconds = 0.0
            if not place.free_bytes:
                # Another server started it: what was free before is not known, and 0 taken would be kept as a fact.
                return
            self._spawn(self._measure(engine, place.free_bytes), f"measure-{engine.id}")

    async def _measure(self, engine: Engine, free_before_bytes: int) -> None:
        """What a spare holds on a GPU is the next run's, and counts as free."""
        for device in await self._devices():
            if device.id == engine.device_id and device.type != "cpu" and engine.is_spare and not engine.had_work:
                taken = free_before_bytes - device.free_memory_bytes
                engine.context_bytes = min(max(taken, 0), _MAX_CONTEXT_BYTES)
                try:
                    await asyncio.to_thread(keep_context, engine.directory, engine.context_bytes)
                except OSError as error:
                    # A server that adopts it takes what it holds for somebody else's.
                    _log.warning("spare-context-not-kept", engine=engine.id, error=str(error))

    async def end(self) -> None:
        """No further spare is started from now on; one that is on its way is waited for, but not for ever: the next
        server adopts or buries what it leaves.
        """
        self._ended = True
        if self._tasks:
            await asyncio.wait(set(self._tasks.values()), timeout=_LAST_START_SECONDS)

    async def dismiss(self) -> None:
        """Have the spares leave that are there, adopted ones too: the server that comes next may be of another version.

        All at once, so that one that takes its time keeps no other.
        """
        leaving = [self._pool.make_room(engine.device_id) for engine in self._pool.spares()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pool.settings.grace_seconds):
                await asyncio.gather(*leaving)
