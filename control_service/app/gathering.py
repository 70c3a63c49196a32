"""Takes batches of events from a stream while those before them are being stored: what came meanwhile is one batch, so
that a commit's time is paid once for all of it. Keeps a bounded number of events and bytes, and what one message of the
stream brings beyond them; a stream that is faster has to wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Final

from control_service.app.tasks import end
from control_service.domain.event import StoredEvent

# Of one transaction: other writers wait for no more than that.
MAX_EVENTS: Final = 512
MAX_BYTES: Final = 1024**2


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

    async def read(self, batches: AsyncIterator[Sequence[StoredEvent]]) -> None:
        """Takes in what comes, to the end of the stream."""
        stream: Any = batches
        try:
            async with aclosing(stream):
                async for batch in stream:
                    self._events += batch
                    self._size_bytes += _size_bytes(batch)
                    self._changed.set()
                    while len(self._events) >= MAX_EVENTS or self._size_bytes >= MAX_BYTES:
                        self._room.clear()
                        await self._room.wait()
        finally:
            self._ended = True
            self._changed.set()

    async def take(self) -> Sequence[StoredEvent]:
        """What has come, as much as goes into a transaction; nothing at the end."""
        while not self._events and not self._ended:
            self._changed.clear()
            await self._changed.wait()
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
        return batch


def _size_bytes(events: Sequence[StoredEvent]) -> int:
    return sum(len(event.payload) for event in events)
