"""The boundary around every call, on a real server with behaviors made to go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from control_service.api.health import HealthReporter
from control_service.api.interceptors import CallConfig, CallInterceptor
from control_service.api.registration import register
from control_service.domain.errors import StoreFull, Unavailable
from tests.fakes.control import reason_of, until
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2, job_service_pb2_grpc

PATIENCE_SECONDS = 60.0
JOB_ID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


# Large, so that what the transport takes in by itself is soon full.
_PAGE = job_service_pb2.WatchJobResponse(events=[event_pb2.Event(sequence=1)] * 10_000).SerializeToString()


class _Servicer(job_service_pb2_grpc.JobServiceServicer):
    """Fails on demand: the job's id says how."""

    def __init__(self) -> None:
        self.calls = 0
        self.closed = asyncio.Event()
        self.poured = 0

    async def GetJob(self, request: Any, context: Any) -> Any:  # noqa: N802  # an RPC's name
        self.calls += 1
        if request.job_id == "defect":
            raise KeyError("the secret of the house")
        if request.job_id == "slow":
            await asyncio.Event().wait()
        return job_service_pb2.GetJobResponse()

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802  # an RPC's name
        try:
            yield job_service_pb2.WatchJobResponse(heartbeat=job_service_pb2.Heartbeat(position=5)).SerializeToString()
            while request.job_id == "pours":
                self.poured += 1
                yield _PAGE
            if request.job_id == "ends":
                raise Unavailable("SHUTTING_DOWN", "the service is stopping", retry_after_seconds=1.0)
            await asyncio.Event().wait()
        finally:
            self.closed.set()


@asynccontextmanager
async def _served(calls: CallInterceptor | None = None, **config: Any) -> AsyncIterator[tuple[_Servicer, Any]]:
    server = grpc.aio.server()
    boundary = calls or CallInterceptor(config=CallConfig(**config))
    servicer = _Servicer()  # type: ignore[abstract]  # two methods are enough here
    register(server, (job_service_pb2_grpc.add_JobServiceServicer_to_server, servicer), wrap=boundary.wrap)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield servicer, job_service_pb2_grpc.JobServiceStub(channel)
    finally:
        await server.stop(None)


def _get(job_id: str) -> job_service_pb2.GetJobRequest:
    return job_service_pb2.GetJobRequest(job_id=job_id)


async def test_a_defect_is_logged_whole_and_told_as_a_request_id() -> None:
    with capture_logs() as logs:
        async with _served() as (_, jobs):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await jobs.GetJob(_get("defect"), metadata=(("x-request-id", "find-me"),), timeout=PATIENCE_SECONDS)
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "find-me" in str(caught.value.details())
    assert "secret" not in repr(caught.value)
    assert any(line["log_level"] == "error" and line.get("exc_info") for line in logs)
    assert [(line["event"], line.get("code")) for line in logs][-1] == ("call", "INTERNAL")


async def test_a_request_id_is_made_when_none_of_use_comes() -> None:
    async with _served() as (_, jobs):
        seen: set[Any] = set()
        for metadata in ((), (("x-request-id", "spaces are not taken"),), (("x-request-id", "i" * 65),)):
            call = jobs.GetJob(_get(JOB_ID), metadata=metadata, timeout=PATIENCE_SECONDS)
            await call
            # Older versions of grpc give metadata that dict() cannot take.
            seen.update(value for key, value in await call.trailing_metadata() if key == "x-request-id")
        assert len(seen) == 3
        assert all(len(request_id) == 16 for request_id in seen)


async def test_a_call_without_time_is_refused_before_it_begins() -> None:
    # No call of a test has 1,000 s left.
    async with _served(min_remaining_seconds=1000.0) as (servicer, jobs):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await jobs.GetJob(_get(JOB_ID), timeout=PATIENCE_SECONDS)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert reason_of(caught.value) == "DEADLINE_TOO_SHORT"
        assert servicer.calls == 0
        await jobs.GetJob(_get(JOB_ID))


async def test_a_call_without_a_deadline_has_ours() -> None:
    async with _served(max_seconds=0.05) as (_, jobs):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await jobs.GetJob(_get("slow"))
        assert reason_of(caught.value) == "DEADLINE_TOO_SHORT"
    async with _served(max_seconds=1000.0, max_seconds_by_method={"GetJob": 0.05}) as (_, jobs):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await jobs.GetJob(_get("slow"))
        assert reason_of(caught.value) == "DEADLINE_TOO_SHORT"


async def test_a_bad_request_does_not_reach_the_behavior() -> None:
    async with _served() as (servicer, jobs):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await jobs.GetJob(_get("x" * 27), timeout=PATIENCE_SECONDS)
        assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await jobs.WatchJob(job_service_pb2.WatchJobRequest(), timeout=PATIENCE_SECONDS).read()
        assert reason_of(caught.value) == "INVALID_FIELD"
        assert servicer.calls == 0


async def test_a_stream_gives_encoded_pages_and_then_its_reason() -> None:
    async with _served() as (servicer, jobs):
        call = jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id="ends"), timeout=PATIENCE_SECONDS)
        assert (await call.read()).heartbeat.position == 5
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert servicer.closed.is_set()


async def test_a_reader_that_leaves_ends_the_behavior() -> None:
    async with _served() as (servicer, jobs):
        call = jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id=JOB_ID), timeout=PATIENCE_SECONDS)
        assert await call.read()
        call.cancel()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await servicer.closed.wait()


async def test_a_draining_boundary_refuses_new_calls_and_waits_for_open_ones() -> None:
    calls = CallInterceptor(config=CallConfig())
    async with _served(calls) as (_, jobs):
        await calls.until_idle()
        watch = jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id=JOB_ID), timeout=PATIENCE_SECONDS)
        assert await watch.read()
        calls.drain()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await jobs.GetJob(_get(JOB_ID), timeout=PATIENCE_SECONDS)
        assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        waiting = asyncio.create_task(calls.until_idle())
        await asyncio.sleep(0)
        assert not waiting.done()
        watch.cancel()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await waiting


async def test_calls_that_outlive_the_grace_are_told_to_call_again() -> None:
    calls = CallInterceptor(config=CallConfig())
    async with _served(calls) as (_, jobs):
        watch = jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id=JOB_ID), timeout=PATIENCE_SECONDS)
        assert await watch.read()
        slow = jobs.GetJob(_get("slow"), timeout=PATIENCE_SECONDS)
        await until(lambda: len(calls._open) == 2)
        calls.drain()
        calls.cut()
        for ended in (watch.read(), slow):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ended
            assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        await calls.until_idle()


class _Store:
    """Answers reads, or fails them."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        # It takes the lock, and has no room for changes.
        self.is_full = False

    async def read(self, work: Any) -> None:
        """Reads go on when only writes fail."""

    async def transact(self, work: Any) -> None:
        if self.failure is not None:
            raise self.failure

    async def check_room(self) -> None:
        if self.is_full:
            raise StoreFull("DISK_FULL", "the database's disk is full")


class _Clock:
    """Sleeps until it is told to wake."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        await self.wake.wait()
        self.wake.clear()


@pytest.mark.parametrize("failure", [Unavailable("STORE_UNAVAILABLE", "locked"), ValueError("damaged")])
async def test_health_follows_the_store_and_ends_with_the_drain(failure: Exception) -> None:
    store, clock = _Store(), _Clock()
    parts: Any = {"store": store, "clock": clock}
    server = grpc.aio.server()
    reporter = HealthReporter(**parts)
    health_pb2_grpc.add_HealthServicer_to_server(reporter.servicer, server)
    reporter.report_for(["a.Service"])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await reporter.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="a.Service"), timeout=PATIENCE_SECONDS)
        states = health_pb2.HealthCheckResponse
        assert (await watch.read()).status == states.SERVING
        store.failure = failure
        clock.wake.set()
        assert (await watch.read()).status == states.NOT_SERVING
        store.failure = None
        clock.wake.set()
        assert (await watch.read()).status == states.SERVING
        await reporter.drain()
        assert (await watch.read()).status == states.NOT_SERVING
        # Which is no reason to kill the process.
        alive = await stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=PATIENCE_SECONDS)
        assert alive.status == states.SERVING
        watch.cancel()
    await server.stop(None)


async def test_a_store_without_room_is_not_ready_until_it_has_some() -> None:
    store, clock = _Store(), _Clock()
    parts: Any = {"store": store, "clock": clock}
    reporter = HealthReporter(**parts)
    told: list[Any] = []

    async def note(status: Any) -> None:
        told.append(status)

    reporter._tell = note  # type: ignore[method-assign]
    await reporter.start()
    try:
        for is_full in (True, False):
            store.is_full = is_full
            clock.wake.set()
            await until(lambda: not clock.wake.is_set())
            await asyncio.sleep(0)
    finally:
        await reporter.drain()
    states = health_pb2.HealthCheckResponse
    assert told == [states.SERVING, states.NOT_SERVING, states.SERVING, states.NOT_SERVING]


async def test_a_reader_that_takes_nothing_is_cut_off_with_a_reason() -> None:
    async with _served(stalled_reader_seconds=0.5) as (servicer, jobs):
        call = jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id="pours"), timeout=PATIENCE_SECONDS)
        assert (await call.read()).heartbeat.position == 5
        async with asyncio.timeout(PATIENCE_SECONDS):
            await servicer.closed.wait()
        # Nothing is held for it any more; what was on its way arrives, then the reason.
        received = 0

        async def read_on() -> None:
            nonlocal received
            while await call.read() is not grpc.aio.EOF:
                received += 1

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_on()
        assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.UNAVAILABLE, "READER_STALLED")
        assert 0 < received <= servicer.poured


async def test_a_slow_reader_is_not_cut_off() -> None:
    async with _served(stalled_reader_seconds=20.0) as (servicer, jobs):
        call = jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id="pours"), timeout=PATIENCE_SECONDS)
        for _ in range(100):
            assert await call.read() is not grpc.aio.EOF
        assert not servicer.closed.is_set()
        call.cancel()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await servicer.closed.wait()
