"""A task that was cancelled once, and went on, hears of its client's end as any other: not of a cancellation again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing, suppress
from typing import Any

import grpc
import pytest

from tests.fakes.scripted_control import FakeControl
from tunesmith.common.v1 import event_pb2, generation_pb2
from tunesmith.control.v1 import inference_service_pb2, job_service_pb2
from tunesmith_client import AsyncClient, CallCancelled, ClientConfig

# Told when a cancellation was swallowed and the client is asked next.
Reader = Callable[[AsyncClient, asyncio.Event], Coroutine[Any, Any, None]]


class _Endless:
    """Answers once where it is a stream, then waits for its caller's end."""

    def __init__(self, *answers: Any) -> None:
        self._answers = answers
        self.waits = threading.Event()

    def stream(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from self._answers
        self._wait(context)

    def call(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._wait(context)
        return self._answers[0]

    def _wait(self, context: grpc.ServicerContext) -> None:
        over = threading.Event()
        context.add_callback(over.set)
        self.waits.set()
        assert over.wait(60), "nobody ends the call"


@pytest.fixture
def control() -> Iterator[FakeControl]:
    with FakeControl() as fake:
        yield fake


async def _swallow(went_on: asyncio.Event) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    assert task.cancelling() > 0
    went_on.set()


async def _call(client: AsyncClient, went_on: asyncio.Event) -> None:
    await _swallow(went_on)
    with pytest.raises(CallCancelled, match="the client is closed"):
        await client.nodes.list()


async def _watch(client: AsyncClient, went_on: asyncio.Event) -> None:
    seen = []
    async for event in client.jobs.watch("j"):
        seen.append(event.sequence)
        # Between two reads of one stream.
        await _swallow(went_on)
    assert seen == [1]


async def _ask(client: AsyncClient, went_on: asyncio.Event) -> None:
    async with aclosing(client.inference.generate("Hello?", job_id="j")) as parts:
        assert (await anext(parts)).text == "Hi"
        await _swallow(went_on)
        with pytest.raises(CallCancelled, match="the client is closed"):
            await anext(parts)


_READERS: dict[str, tuple[str, Reader]] = {
    "call": ("ListNodes", _call),
    "watch": ("WatchJob", _watch),
    "answer": ("Generate", _ask),
}


def _serve(control: FakeControl, method: str) -> _Endless:
    part = generation_pb2.GeneratedPart(text="Hi", num_tokens=1)
    answers = {
        "WatchJob": job_service_pb2.WatchJobResponse(events=[event_pb2.Event(sequence=1)]),
        "Generate": inference_service_pb2.GenerateResponse(part=part),
    }
    endless = _Endless(*(answers[name] for name in (method,) if name in answers))
    control.handlers[method] = endless.stream if method in answers else endless.call
    return endless


def _client(control: FakeControl) -> AsyncClient:
    return AsyncClient(config=ClientConfig(address=control.address, deadline_seconds=3600.0))


async def _begin(read: Reader, client: AsyncClient, endless: _Endless) -> asyncio.Task[None]:
    """A task that waits for the server, or is about to, behind a cancellation that it swallowed."""
    went_on = asyncio.Event()
    reading = asyncio.create_task(read(client, went_on))
    await asyncio.wait_for(went_on.wait(), 60)
    assert await asyncio.to_thread(endless.waits.wait, 60)
    return reading


@pytest.mark.parametrize("kind", _READERS)
async def test_what_was_swallowed_is_not_told_again_when_the_client_is_closed(kind: str, control: FakeControl) -> None:
    method, read = _READERS[kind]
    client = _client(control)
    reading = await _begin(read, client, _serve(control, method))
    await client.close()
    await asyncio.wait_for(reading, 60)


@pytest.mark.parametrize("kind", _READERS)
async def test_a_cancellation_after_it_is_heard_whatever_becomes_of_the_client(kind: str, control: FakeControl) -> None:
    method, read = _READERS[kind]
    client = _client(control)
    reading = await _begin(read, client, _serve(control, method))
    reading.cancel()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_one_that_is_still_on_its_way_is_told_by_a_closed_client_too(control: FakeControl) -> None:
    async def call_late(client: AsyncClient) -> None:
        await _swallow(asyncio.Event())
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await client.nodes.list()

    client = _client(control)
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(call_late(client))
