"""Events that come while others are being stored: one batch, in order, bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime

import pytest

from control_service.app import gathering
from control_service.app.gathering import MAX_BYTES, MAX_EVENTS, gathered
from control_service.domain.errors import Unavailable
from control_service.domain.event import EventKind, StoredEvent

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def _event(run_sequence: int, *, size_bytes: int = 1) -> StoredEvent:
    return StoredEvent(
        sequence=0, attempt=1, run_sequence=run_sequence, kind=EventKind.STEP, time=NOW, payload=b"x" * size_bytes
    )


class _Stream:
    """Gives one event a batch; counts what was taken, and says that it was closed."""

    def __init__(self, number: int, *, size_bytes: int = 1, error: Exception | None = None, ends: bool = True) -> None:
        self._number, self._size_bytes, self._error, self._ends = number, size_bytes, error, ends
        self.num_given = 0
        self.closed = False

    async def batches(self) -> AsyncIterator[Sequence[StoredEvent]]:
        try:
            for run_sequence in range(1, self._number + 1):
                self.num_given += 1
                yield (_event(run_sequence, size_bytes=self._size_bytes),)
                await asyncio.sleep(0)
            if self._error is not None:
                raise self._error
            if not self._ends:
                await asyncio.Event().wait()
        finally:
            self.closed = True


async def _until_nothing_moves(stream: _Stream) -> None:
    before = -1
    while before != stream.num_given:
        before = stream.num_given
        for _ in range(10):
            await asyncio.sleep(0)


async def test_what_came_meanwhile_is_one_batch() -> None:
    stream = _Stream(100)
    batches = []
    async for batch in gathered(stream.batches()):
        batches.append([event.run_sequence for event in batch])
        await _until_nothing_moves(stream)
    assert [number for batch in batches for number in batch] == list(range(1, 101))
    assert len(batches) == 2
    assert stream.closed


async def test_a_stream_that_is_faster_has_to_wait() -> None:
    stream = _Stream(10 * MAX_EVENTS)
    seen: list[int] = []
    async for batch in gathered(stream.batches()):
        assert len(batch) <= MAX_EVENTS
        seen += [event.run_sequence for event in batch]
        await _until_nothing_moves(stream)
        assert stream.num_given - len(seen) <= MAX_EVENTS
    assert seen == list(range(1, 10 * MAX_EVENTS + 1))


async def test_a_batch_of_large_events_is_cut() -> None:
    stream = _Stream(9, size_bytes=MAX_BYTES // 3)
    sizes, seen = [], []
    async for batch in gathered(stream.batches()):
        sizes.append(len(batch))
        seen += [event.run_sequence for event in batch]
        await _until_nothing_moves(stream)
    assert seen == list(range(1, 10))
    assert max(sizes) == 3


async def test_large_events_wait_in_the_stream_and_not_in_memory() -> None:
    stream = _Stream(40, size_bytes=MAX_BYTES // 3)
    seen: list[int] = []
    async for batch in gathered(stream.batches()):
        seen += [event.run_sequence for event in batch]
        await _until_nothing_moves(stream)
        # As many as reach the limit, however few that are.
        assert stream.num_given - len(seen) <= 4
    assert seen == list(range(1, 41))


async def test_an_event_larger_than_a_transaction_goes_through() -> None:
    stream = _Stream(3, size_bytes=2 * MAX_BYTES)
    assert [len(batch) async for batch in gathered(stream.batches())] == [1, 1, 1]


async def test_an_error_comes_after_all_that_came_before_it() -> None:
    seen: list[int] = []

    async def read() -> None:
        async for batch in gathered(_Stream(5, error=Unavailable("NODE_UNREACHABLE", "gone")).batches()):
            seen.extend(event.run_sequence for event in batch)

    with pytest.raises(Unavailable, match="gone"):
        await read()
    assert seen == [1, 2, 3, 4, 5]


async def test_a_reader_that_goes_away_closes_the_stream() -> None:
    stream = _Stream(1000)
    batches = gathered(stream.batches())
    assert await anext(batches)
    await batches.aclose()
    assert stream.closed


async def test_what_comes_soon_after_a_batch_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "PAUSE_SECONDS", 1.0)
    batches = [[event.run_sequence for event in batch] async for batch in gathered(_Stream(20).batches())]
    assert [number for batch in batches for number in batch] == list(range(1, 21))
    assert len(batches) == 2


async def test_a_full_batch_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "PAUSE_SECONDS", 3600.0)
    async with asyncio.timeout(60.0):
        batches = [batch async for batch in gathered(_Stream(2 * MAX_EVENTS).batches()) if len(batch) > 1]
    # The first one is what came first; the last is the rest of a stream that has ended.
    assert [len(batch) for batch in batches] == [MAX_EVENTS, MAX_EVENTS - 1]


async def test_what_has_come_is_taken_when_the_pause_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "PAUSE_SECONDS", 0.05)
    stream = _Stream(2, ends=False)
    async with asyncio.timeout(60.0), aclosing(gathered(stream.batches())) as batches:
        # Few, and the stream goes on: nothing but the pause's end brings the second batch.
        assert [[event.run_sequence for event in await anext(batches)] for _ in range(2)] == [[1], [2]]
    assert stream.closed


async def test_a_reader_that_is_cancelled_in_the_pause_hears_of_it_and_closes_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gathering, "PAUSE_SECONDS", 3600.0)
    stream = _Stream(MAX_EVENTS // 2, ends=False)
    seen: list[int] = []

    async def read() -> None:
        async with aclosing(gathered(stream.batches())) as batches:
            async for batch in batches:
                seen.extend(event.run_sequence for event in batch)

    reading = asyncio.create_task(read())
    await _until_nothing_moves(stream)
    reading.cancel()
    async with asyncio.timeout(60.0):
        with pytest.raises(asyncio.CancelledError):
            await reading
    # All but the first were waiting for the pause's end.
    assert (seen, stream.num_given, stream.closed) == ([1], MAX_EVENTS // 2, True)
