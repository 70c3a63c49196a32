"""An asyncio watch that is cancelled: its task hears of that, whatever was counted before."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2
from tunesmith_client import ClientConfig
from tunesmith_client._cursor import Cursor
from tunesmith_client._watch_aio import watch


class _Stream:
    """Brings one event a read."""

    def __init__(self) -> None:
        self._sequence = 0

    async def read(self) -> job_service_pb2.WatchJobResponse:
        self._sequence += 1
        return job_service_pb2.WatchJobResponse(events=[event_pb2.Event(sequence=self._sequence)])

    def cancel(self) -> None:
        pass


async def test_a_cancellation_between_two_reads_is_heard_after_one_that_was_taken_back() -> None:
    is_closed = False
    stream: Any = _Stream()
    cursor = Cursor(job_id="j", after_sequence=0, config=ClientConfig())

    async def read() -> None:
        nonlocal is_closed
        task = asyncio.current_task()
        assert task is not None
        events = watch(lambda _: stream, cursor, limit_seconds=60.0, is_closed=lambda: is_closed)
        assert (await anext(events)).sequence == 1
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        # This read counts one cancellation, which is taken back then.
        assert (await anext(events)).sequence == 2
        task.uncancel()
        is_closed = True
        task.cancel()
        await anext(events)

    async with asyncio.timeout(60.0):
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(read())
