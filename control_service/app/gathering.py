"""Takes batches of events from a stream while those before them are being stored: what came meanwhile is one batch, so
that a commit's time is paid once for all of it. What comes soon after a batch was taken is gathered for a moment: small
transactions close upon each other cost a busy loop more than they gain. Keeps a bounded number of events and bytes, and
what one message of the stream brings beyond them; a stream that is faster has to wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from typing import Any, Final

from control_service.app.tasks import end
from control_service.domain.event import StoredEvent

# Of one transaction: other writers wait for no more than that.
MAX_EVENTS: Final = 512
MAX_BYTES: Final = 1024**2
# From one batch to the next one, unless it is full. Watchers of a busy log are shown it more seldom than that.
PAUSE_SECONDS: Final = 0.006


async def gathered(batches: AsyncIterator[Sequence[StoredEvent]]) -> AsyncGenerator[Sequence[StoredEvent], None]:
    """The events of the stream in order, in batches of what has come. A stream's error is raised after all that came
    before it; the stream is closed when its reader goes away."""
    gathering = _Gathering()
    reading = asyncio.create_task(gathering.read(batches))
    try:
        while batch := await gathering.take():
            yield batch
        await reading
    finally:
        await end(reading)


class _Gathering:
    """What has come and was not taken."""

    def __init__(self) -> None:
        self._events: list[StoredEvent] = []
        self._size_bytes = 0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._ended = False
        # There is a full batch, or no more comes.
        self._pressing = asyncio.Event()
        # When the next batch may be taken, by the loop's clock.
        self._next_seconds = 0.0

    async def read(self, batches: AsyncIterator[Sequence[StoredEvent]]) -> None:
        """Takes in what comes, to the end of the stream."""
        stream: Any = batches
        try:
            async with aclosing(stream):
                async for batch in stream:
                    self._events += batch
                    self._size_bytes += _size_bytes(batch)
                    self._changed.set()
                    while self._is_full():
                        self._pressing.set()
                        self._room.clear()
                        await self._room.wait()
        finally:
            self._ended = True
            self._changed.set()
            self._pressing.set()

    async def take(self) -> Sequence[StoredEvent]:
        """What has come, as much as goes into a transaction; nothing at the end."""
        while not self._events and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        await self._pause()
        size_bytes = count = 0
        for count, event in enumerate(self._events[:MAX_EVENTS]):
            size_bytes += len(event.payload)
            if count and size_bytes > MAX_BYTES:
                break
        else:
            count = min(len(self._events), MAX_EVENTS)
        batch, self._events = self._events[:count], self._events[count:]
        self._size_bytes -= _size_bytes(batch)
        self._room.set()
        if not self._ended and not self._is_full():
            self._pressing.clear()
        return batch

    async def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < self._next_seconds:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._next_seconds):
                    await self._pressing.wait()
        self._next_seconds = loop.time() + PAUSE_SECONDS

    def _is_full(self) -> bool:
        return len(self._events) >= MAX_EVENTS or self._size_bytes >= MAX_BYTES


def _size_bytes(events: Sequence[StoredEvent]) -> int:
    return sum(len(event.payload) for event in events)
