"""Watches over a real wire that breaks: each event once, in order, to the end of the job."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from tests.fakes.scripted_control import FakeControl, refuse
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2
from tunesmith_client import AsyncClient, CallCancelled, Client, ClientConfig, OutOfRange, RetryPolicy, Unavailable

Scene = Callable[[job_service_pb2.WatchJobRequest, grpc.ServicerContext], Iterator[job_service_pb2.WatchJobResponse]]
LAST = 40


def events(first: int, last: int) -> job_service_pb2.WatchJobResponse:
    return job_service_pb2.WatchJobResponse(events=[event_pb2.Event(sequence=n) for n in range(first, last + 1)])


def heartbeat(position: int) -> job_service_pb2.WatchJobResponse:
    return job_service_pb2.WatchJobResponse(heartbeat=job_service_pb2.Heartbeat(position=position))


def cut_after_some(request: job_service_pb2.WatchJobRequest, context: grpc.ServicerContext) -> Any:
    """At most seven events, some of them the receiver's already, then a broken wire; near the end the whole tail."""
    after = request.after_sequence
    yield heartbeat(after)
    yield events(max(1, after), min(after + 7, LAST))
    if after + 7 < LAST:
        context.abort(grpc.StatusCode.UNAVAILABLE, "the wire broke")


class Silent:
    """Says nothing at all on the first stream, everything on the second."""

    def __init__(self) -> None:
        self.streams = 0
        self.over = threading.Event()

    def __call__(self, request: job_service_pb2.WatchJobRequest, context: grpc.ServicerContext) -> Any:
        self.streams += 1
        if self.streams == 1:
            context.add_callback(self.over.set)
            yield events(1, 3)
            self.over.wait(30)
        else:
            yield events(request.after_sequence + 1, 5)


def compacted(request: job_service_pb2.WatchJobRequest, context: grpc.ServicerContext) -> Any:
    refuse(context, grpc.StatusCode.OUT_OF_RANGE, "HISTORY_COMPACTED", metadata={"oldest_sequence": "12"})
    yield


def config(control: FakeControl, *, heartbeat_seconds: float = 15.0, give_up: float = 60.0) -> ClientConfig:
    return ClientConfig(
        address=control.address,
        retry=RetryPolicy(initial_backoff_seconds=0.01, max_backoff_seconds=0.02),
        heartbeat_seconds=heartbeat_seconds,
        watch_give_up_seconds=give_up,
    )


async def collect(settings: ClientConfig) -> list[int]:
    async with AsyncClient(config=settings) as client:
        return [event.sequence async for event in client.jobs.watch("j")]


def test_a_wire_that_breaks_often_loses_and_doubles_nothing() -> None:
    with FakeControl() as control, Client(config=config(control)) as client:
        control.handlers["WatchJob"] = cut_after_some
        assert [event.sequence for event in client.jobs.watch("j")] == list(range(1, LAST + 1))
        positions = [request.after_sequence for request in control.calls("WatchJob")]
        assert positions == [0, 7, 14, 21, 28, 35]


async def test_asyncio_a_wire_that_breaks_often_loses_and_doubles_nothing() -> None:
    with FakeControl() as control:
        control.handlers["WatchJob"] = cut_after_some
        assert await collect(config(control)) == list(range(1, LAST + 1))


def test_a_watch_starts_after_any_sequence() -> None:
    with FakeControl() as control, Client(config=config(control)) as client:
        control.handlers["WatchJob"] = cut_after_some
        assert [event.sequence for event in client.jobs.watch("j", after_sequence=37)] == [38, 39, 40]


def test_a_silent_stream_is_noticed_and_replaced() -> None:
    silent = Silent()
    with FakeControl() as control, Client(config=config(control, heartbeat_seconds=0.2)) as client:
        control.handlers["WatchJob"] = silent
        assert [event.sequence for event in client.jobs.watch("j")] == [1, 2, 3, 4, 5]
    assert silent.streams == 2


async def test_asyncio_a_silent_stream_is_noticed_and_replaced() -> None:
    silent = Silent()
    with FakeControl() as control:
        control.handlers["WatchJob"] = silent
        assert await collect(config(control, heartbeat_seconds=0.2)) == [1, 2, 3, 4, 5]
    assert silent.streams == 2


def test_a_user_who_takes_long_is_not_a_silent_stream() -> None:
    calls = 0

    def scene(request: job_service_pb2.WatchJobRequest, context: grpc.ServicerContext) -> Any:
        nonlocal calls
        calls += 1
        yield events(1, 2)

    with FakeControl() as control, Client(config=config(control, heartbeat_seconds=0.05)) as client:
        control.handlers["WatchJob"] = scene
        watch = client.jobs.watch("j")
        assert next(watch).sequence == 1
        # Longer than the silence limit; the alarm must not count it.
        threading.Event().wait(0.3)
        assert [event.sequence for event in watch] == [2]
    assert calls == 1


def test_compacted_history_is_said() -> None:
    with FakeControl() as control, Client(config=config(control)) as client:
        control.handlers["WatchJob"] = compacted
        with pytest.raises(OutOfRange) as raised:
            list(client.jobs.watch("j"))
        assert raised.value.reason == "HISTORY_COMPACTED"
        assert raised.value.metadata["oldest_sequence"] == "12"


async def test_asyncio_compacted_history_is_said() -> None:
    with FakeControl() as control:
        control.handlers["WatchJob"] = compacted
        with pytest.raises(OutOfRange):
            await collect(config(control))


def test_a_service_that_never_answers_is_given_up() -> None:
    with FakeControl() as control:
        settings = config(control, give_up=0.2)
    with Client(config=settings) as client, pytest.raises(Unavailable):
        list(client.jobs.watch("j"))


def test_closing_ends_a_watch_that_waits() -> None:
    over = threading.Event()

    def quiet(request: job_service_pb2.WatchJobRequest, context: grpc.ServicerContext) -> Any:
        context.add_callback(over.set)
        yield events(1, 1)
        over.wait(30)

    with FakeControl() as control, Client(config=config(control)) as client:
        control.handlers["WatchJob"] = quiet
        watch = client.jobs.watch("j")
        assert next(watch).sequence == 1
        closer = threading.Timer(0.05, watch.close)
        closer.start()
        assert list(watch) == []
        closer.join()
    assert over.wait(10), "the server's side of the stream ended too"


@pytest.mark.parametrize("is_reconnecting", [False, True])
def test_closing_the_client_ends_a_watch_that_waits(is_reconnecting: bool) -> None:
    over, waits = threading.Event(), threading.Event()

    def quiet(request: job_service_pb2.WatchJobRequest, context: grpc.ServicerContext) -> Any:
        context.add_callback(over.set)
        if not request.after_sequence:
            yield events(1, 1)
        waits.set()
        if is_reconnecting:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the wire broke")
        over.wait(30)

    with FakeControl() as control:
        client = Client(config=config(control))
        control.handlers["WatchJob"] = quiet
        watch = client.jobs.watch("j")
        assert next(watch).sequence == 1

        def close() -> None:
            waits.wait(30)
            client.close()

        closer = threading.Thread(target=close)
        closer.start()
        assert list(watch) == []
        closer.join()
    assert over.wait(10), "the server's side of the stream ended too"


async def test_a_closed_client_refuses_another_watch() -> None:
    with FakeControl() as control:
        client, asking = Client(config=config(control)), AsyncClient(config=config(control))
        client.close()
        await asking.close()
        with pytest.raises(CallCancelled, match="closed"):
            client.jobs.watch("j")
        with pytest.raises(CallCancelled, match="closed"):
            await anext(aiter(asking.jobs.watch("j")))


@pytest.mark.parametrize("is_reconnecting", [False, True])
async def test_asyncio_closing_the_client_ends_a_watch_that_waits(is_reconnecting: bool) -> None:
    over, waits = threading.Event(), threading.Event()

    def quiet(request: job_service_pb2.WatchJobRequest, context: grpc.ServicerContext) -> Any:
        context.add_callback(over.set)
        if not request.after_sequence:
            yield events(1, 1)
        waits.set()
        if is_reconnecting:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the wire broke")
        over.wait(30)

    async def read(client: AsyncClient) -> list[int]:
        return [event.sequence async for event in client.jobs.watch("j")]

    with FakeControl() as control:
        control.handlers["WatchJob"] = quiet
        client = AsyncClient(config=config(control))
        reading = asyncio.create_task(read(client))
        assert await asyncio.to_thread(waits.wait, 30)
        await client.close()
        assert await asyncio.wait_for(reading, 30) in ([], [1])
        assert await asyncio.to_thread(over.wait, 10)


async def test_asyncio_cancelling_the_reader_ends_the_stream() -> None:
    over = threading.Event()

    def quiet(request: job_service_pb2.WatchJobRequest, context: grpc.ServicerContext) -> Any:
        context.add_callback(over.set)
        yield events(1, 1)
        over.wait(30)

    first = asyncio.Event()

    async def read(client: AsyncClient) -> None:
        async for _ in client.jobs.watch("j"):
            first.set()

    with FakeControl() as control:
        control.handlers["WatchJob"] = quiet
        async with AsyncClient(config=config(control)) as client:
            task = asyncio.create_task(read(client))
            await asyncio.wait_for(first.wait(), 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await asyncio.to_thread(over.wait, 10)
