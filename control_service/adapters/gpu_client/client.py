"""Implements `app.ports.NodeClient` and `NodeDialer` over grpc.aio. Keeps no state of runs and never retries a call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc

from control_service.adapters.gpu_client.channel_options import CHANNEL_OPTIONS
from control_service.adapters.gpu_client.errors import domain_error
from control_service.adapters.gpu_client.messages import (
    PLAN_LEVELS,
    STOP_MODES,
    capabilities_value,
    event_values,
    generate_message,
    inspect_message,
    inspection_value,
    key_message,
    part_value,
    report_value,
    run_value,
    start_run_message,
)
from control_service.app.ports import InspectDataset, PlanLevel, StartRun
from control_service.domain.dataset import DatasetInspection
from control_service.domain.errors import DeadlineTooShort, NotFound, TunesmithError, Unavailable
from control_service.domain.event import StoredEvent
from control_service.domain.generation import GeneratedPart, GenerationRequest
from control_service.domain.node import NodeCapabilities, NodeReport
from control_service.domain.run import ObservedRun, RunKey, StopMode
from control_service.domain.spec import TrainingSpec
from control_service.wire.training_spec import proto_json, spec_message
from tunesmith.gpu.v1 import (
    blob_service_pb2,
    blob_service_pb2_grpc,
    inference_service_pb2_grpc,
    run_service_pb2,
    run_service_pb2_grpc,
)

CHUNK_BYTES: Final = 1024**2
Response = TypeVar("Response")


@dataclass(frozen=True, kw_only=True)
class NodeClientConfig:
    """How long a call to a node may take. Watches have no deadline: keepalive notices a dead link."""

    call_timeout_seconds: float = 15.0
    start_timeout_seconds: float = 60.0
    plan_check_timeout_seconds: float = 15.0
    plan_exact_timeout_seconds: float = 1800.0
    # Tokens of a whole dataset may be counted.
    inspect_timeout_seconds: float = 1800.0
    # A transfer may take its base time and then as long as its bytes need at this rate.
    transfer_base_seconds: float = 60.0
    transfer_minimum_bytes_per_second: float = 256 * 1024
    # A node that is alive but sends no more of a blob: pings do not notice it.
    read_idle_seconds: float = 60.0


class GrpcNodeDialer:
    """Implements `app.ports.NodeDialer`."""

    def __init__(self, *, config: NodeClientConfig) -> None:
        self._config = config

    def dial(self, *, name: str, address: str, installation_id: str) -> GrpcNodeClient:
        """A client for `host:port`; the connection is made by the first call."""
        return GrpcNodeClient(
            name=name,
            channel=grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS),
            installation_id=installation_id,
            config=self._config,
        )


class GrpcNodeClient:
    """Implements `app.ports.NodeClient`. Owns its channel."""

    def __init__(self, *, name: str, channel: grpc.aio.Channel, installation_id: str, config: NodeClientConfig) -> None:
        self._name = name
        self._channel = channel
        self._installation_id = installation_id
        self._config = config
        self._is_closed = False
        self._runs = run_service_pb2_grpc.RunServiceStub(channel)
        self._blobs = blob_service_pb2_grpc.BlobServiceStub(channel)
        self._inference = inference_service_pb2_grpc.InferenceServiceStub(channel)
        self._plan_timeouts: Mapping[PlanLevel, float] = {
            PlanLevel.CHECK: config.plan_check_timeout_seconds,
            PlanLevel.EXACT: config.plan_exact_timeout_seconds,
        }

    async def capabilities(self) -> NodeCapabilities:
        """What the node is and can do."""
        with self._translated():
            return capabilities_value(
                await self._runs.GetCapabilities(
                    run_service_pb2.GetCapabilitiesRequest(), timeout=self._config.call_timeout_seconds
                )
            )

    async def plan_run(
        self,
        *,
        spec: TrainingSpec,
        level: PlanLevel,
        probe_memory: bool = False,
        timeout_seconds: float | None = None,
    ) -> Mapping[str, Any]:
        """`Plan` as proto JSON with proto field names."""
        request = run_service_pb2.PlanRunRequest(
            spec=spec_message(spec),
            level=PLAN_LEVELS[level],
            installation_id=self._installation_id,
            probe_memory=probe_memory,
        )
        limit = self._plan_timeouts[level]
        timeout = limit if timeout_seconds is None else min(limit, timeout_seconds)
        with self._timed("planning", timeout):
            response = await self._runs.PlanRun(request, timeout=timeout)
        return proto_json(response.plan)

    async def inspect_dataset(
        self, request: InspectDataset, *, timeout_seconds: float | None = None
    ) -> DatasetInspection:
        """Rows of a dataset that the node has, as a base will see them, and their tokens."""
        limit = self._config.inspect_timeout_seconds
        timeout = limit if timeout_seconds is None else min(limit, timeout_seconds)
        message = inspect_message(request, installation_id=self._installation_id)
        with self._timed("reading the dataset on the node", timeout):
            response = await self._runs.InspectDataset(message, timeout=timeout)
        return inspection_value(response)

    async def start_run(self, request: StartRun) -> ObservedRun:
        """Starts an attempt; the same request again is the same run."""
        with self._translated():
            response = await self._runs.StartRun(start_run_message(request), timeout=self._config.start_timeout_seconds)
        return run_value(response.run)

    async def get_run(self, key: RunKey) -> ObservedRun | None:
        """The run as it stands; None when the node has no such run."""
        try:
            with self._translated():
                response = await self._runs.GetRun(
                    run_service_pb2.GetRunRequest(key=key_message(key)), timeout=self._config.call_timeout_seconds
                )
        except NotFound:
            return None
        return run_value(response.run)

    async def stop_run(self, key: RunKey, *, mode: StopMode, grace_seconds: float = 0.0) -> ObservedRun | None:
        """Asks a run to end; answers at once. None: the node has no such run."""
        request = run_service_pb2.StopRunRequest(
            key=key_message(key), mode=STOP_MODES[mode], grace_seconds=grace_seconds
        )
        try:
            with self._translated():
                response = await self._runs.StopRun(request, timeout=self._config.call_timeout_seconds)
        except NotFound:
            return None
        return run_value(response.run)

    async def release_run(self, key: RunKey) -> int:
        """Lets the node delete a run that is over; bytes freed."""
        with self._translated():
            response = await self._runs.ReleaseRun(
                run_service_pb2.ReleaseRunRequest(key=key_message(key)), timeout=self._config.call_timeout_seconds
            )
        return response.freed_bytes

    async def watch_run(self, key: RunKey, *, after_run_sequence: int) -> AsyncIterator[Sequence[StoredEvent]]:
        """Batches in run sequence, history then tail; ends after the last event of a run that is over."""
        request = run_service_pb2.WatchRunRequest(key=key_message(key), after_run_sequence=after_run_sequence)
        async for message in self._messages(lambda: self._runs.WatchRun(request)):
            yield event_values(message)

    async def watch_node(self, *, heartbeat_seconds: float) -> AsyncIterator[NodeReport]:
        """The node's report at once, on every change, and every heartbeat."""
        request = run_service_pb2.WatchNodeRequest(
            installation_id=self._installation_id, heartbeat_seconds=heartbeat_seconds
        )
        async for message in self._messages(lambda: self._runs.WatchNode(request)):
            yield report_value(message)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedPart, None]:
        """An answer in parts; the call is cancelled when its reader goes away."""
        message = generate_message(request)
        async with aclosing(self._messages(lambda: self._inference.Generate(message))) as responses:
            async for response in responses:
                yield part_value(response.part)

    async def find_missing_blobs(self, sha256s: Sequence[str]) -> Mapping[str, int]:
        """Blobs that the node lacks -> bytes of an unfinished write that can be continued."""
        with self._translated():
            response = await self._blobs.FindMissingBlobs(
                blob_service_pb2.FindMissingBlobsRequest(sha256=sha256s), timeout=self._config.call_timeout_seconds
            )
        return {blob.sha256: blob.stored_bytes for blob in response.missing}

    async def write_blob(self, *, sha256: str, size_bytes: int, offset: int, chunks: AsyncIterable[bytes]) -> None:
        """Sends a blob from `offset` on; visible on the node only when size and SHA-256 are right."""

        unreadable: list[TunesmithError] = []

        async def requests() -> AsyncIterator[blob_service_pb2.WriteBlobRequest]:
            yield blob_service_pb2.WriteBlobRequest(sha256=sha256, size_bytes=size_bytes, offset=offset)
            try:
                async for chunk in chunks:
                    for start in range(0, len(chunk), CHUNK_BYTES):
                        yield blob_service_pb2.WriteBlobRequest(chunk=chunk[start : start + CHUNK_BYTES])
            except TunesmithError as error:
                # grpc cancels the call and tells nobody why.
                unreadable.append(error)
                raise

        with self._translated(unreadable):
            await self._blobs.WriteBlob(requests(), timeout=self._transfer_seconds(size_bytes - offset))

    async def read_blob(self, sha256: str, *, offset: int = 0) -> AsyncIterator[bytes]:
        """A blob, or a file of a run's artifact or checkpoint, by content."""
        # The size is not known here, so there is no deadline but one for silence.
        request = blob_service_pb2.ReadBlobRequest(sha256=sha256, offset=offset)
        idle_seconds = self._config.read_idle_seconds
        async for message in self._messages(lambda: self._blobs.ReadBlob(request), idle_seconds=idle_seconds):
            yield message.chunk

    async def close(self) -> None:
        """Gives the connection back; calls that are under way are cancelled."""
        self._is_closed = True
        await self._channel.close()

    async def _messages(
        self, make_call: Callable[[], Any], *, idle_seconds: float | None = None
    ) -> AsyncGenerator[Any, None]:
        """A stream's messages; the call is cancelled when its reader goes away. Unavailable after `idle_seconds`
        without one."""
        with self._translated():
            call = make_call()
        try:
            while True:
                limit = asyncio.timeout(idle_seconds)
                try:
                    # Not around the yield: only the node's time counts.
                    with self._translated():
                        async with limit:
                            message = await call.read()
                except TimeoutError as error:
                    raise self._unreachable(f"nothing arrived for {idle_seconds} s") from error
                if message is grpc.aio.EOF:
                    return
                yield message
        finally:
            call.cancel()

    def _transfer_seconds(self, size_bytes: int) -> float:
        config = self._config
        return config.transfer_base_seconds + max(0, size_bytes) / config.transfer_minimum_bytes_per_second

    @contextmanager
    def _timed(self, what: str, timeout_seconds: float) -> Iterator[None]:
        """Around work that may need more time than the caller has; the node is there all the same."""
        try:
            with self._translated():
                yield
        except Unavailable as error:
            cause = error.__cause__
            if isinstance(cause, grpc.aio.AioRpcError) and cause.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineTooShort(
                    "DEADLINE_TOO_SHORT", f"{what} took longer than {timeout_seconds:g} s", details=error.details
                ) from cause
            raise

    @contextmanager
    def _translated(self, unreadable: Sequence[TunesmithError] = ()) -> Iterator[None]:
        """Around each wait for the node. `unreadable`: why what was to be sent could not be read, once that is so."""
        if self._is_closed:
            raise self._unreachable("the connection was closed")
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise domain_error(error, node=self._name) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled the caller: the call was ended, by `close` or for want of what it was to send.
            raise (unreadable[0] if unreadable else self._unreachable("the connection was closed")) from error

    def _unreachable(self, why: str) -> Unavailable:
        return Unavailable(
            "NODE_UNREACHABLE", f"node {self._name}: {why}", details={"node": self._name}, retry_after_seconds=1.0
        )
