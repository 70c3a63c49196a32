"""Streams of the GPU service to readers that take nothing, and to such as ask for too much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from gpu_service.api import runs
from gpu_service.api.interceptors import CallInterceptor
from gpu_service.runs.signal import Signal
from tests.fakes.control import reason_of
from tunesmith.common.v1 import event_pb2
from tunesmith.gpu.v1 import run_service_pb2, run_service_pb2_grpc

PATIENCE_SECONDS = 60.0
# Large, so that what the transport takes in by itself is soon full.
_BATCH = run_service_pb2.WatchRunResponse(events=[event_pb2.EncodedEvent(payload=b"x" * 1000)] * 500)


class _Pouring(run_service_pb2_grpc.RunServiceServicer):
    """Gives as much as its reader takes."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.poured = 0

    async def WatchRun(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802  # an RPC's name
        try:
            while True:
                self.poured += 1
                yield _BATCH
        finally:
            self.closed.set()


async def test_a_reader_that_takes_nothing_of_a_run_is_cut_off_with_a_reason() -> None:
    server = grpc.aio.server(interceptors=[CallInterceptor(stalled_reader_seconds=0.5)])
    servicer = _Pouring()  # type: ignore[abstract]  # one method is enough here
    run_service_pb2_grpc.add_RunServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = run_service_pb2_grpc.RunServiceStub(channel)
            call = stub.WatchRun(run_service_pb2.WatchRunRequest(), timeout=PATIENCE_SECONDS)
            assert await call.read() == _BATCH
            async with asyncio.timeout(PATIENCE_SECONDS):
                await servicer.closed.wait()
            received = 1

            async def read_on() -> None:
                nonlocal received
                while await call.read() is not grpc.aio.EOF:
                    received += 1

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_on()
            assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.UNAVAILABLE, "READER_STALLED")
            assert 1 < received <= servicer.poured
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("asked", "given"), [(0.0, 5.0), (1e-9, 0.2), (0.2, 0.2), (7.5, 7.5), (600.0, 600.0), (1e300, 600.0)]
)
async def test_reports_come_neither_endlessly_nor_never(
    monkeypatch: pytest.MonkeyPatch, asked: float, given: float
) -> None:
    waited: list[float] = []

    async def wait_for(_: asyncio.Event, timeout_seconds: float) -> None:
        waited.append(timeout_seconds)
        manager.finished = True

    async def none() -> list[Any]:
        return []

    async def accepting() -> bool:
        return True

    monkeypatch.setattr(runs, "wait_for", wait_for)
    manager: Any = SimpleNamespace(
        changed=Signal(),
        finished=False,
        draining=False,
        resident_base_model="",
        list_runs=lambda _: [],
        accepting=accepting,
        check_owner=lambda _: None,
    )
    parts: dict[str, Any] = dict.fromkeys(("planning", "prober", "inspection", "capabilities"))
    parts["admission"] = SimpleNamespace(devices=none)
    servicer = runs.RunServicer(manager=manager, node_name="n", instance_id="i", **parts)
    request = run_service_pb2.WatchNodeRequest(heartbeat_seconds=asked)
    context: Any = None
    assert len([report async for report in servicer.WatchNode(request, context)]) == 2
    assert waited == [given]
