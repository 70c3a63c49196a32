"""The composition root: the only file that knows every concrete class. Builds, starts and stops; decides nothing."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from control_service.adapters.blobs.imports import DirectoryImportRoot
from control_service.adapters.blobs.store import DiskBlobStore
from control_service.adapters.clock import SystemClock, system_ids
from control_service.adapters.event_codec import ProtoEventCodec
from control_service.adapters.files.reader import DatasetFileReader
from control_service.adapters.gpu_client.client import GrpcNodeDialer, NodeClientConfig
from control_service.adapters.sql.store import DATABASE_NAME, SqlStore
from control_service.api.artifacts import ArtifactServicer
from control_service.api.connections import hang_up, refuse_new
from control_service.api.datasets import DatasetServicer
from control_service.api.dependencies import Dependencies, EdgeConfig
from control_service.api.health import HEALTH, HealthReporter
from control_service.api.inference import InferenceServicer
from control_service.api.interceptors import CallConfig, CallInterceptor
from control_service.api.jobs import JobServicer
from control_service.api.models import ModelServicer
from control_service.api.nodes import NodeServicer
from control_service.api.paging import PageTokens
from control_service.api.projects import ProjectServicer
from control_service.api.registration import register
from control_service.api.server_options import MAX_CONCURRENT_CALLS, SERVER_OPTIONS
from control_service.app.dataset_intake import DatasetLimits, ReadTurns
from control_service.app.event_hub import EventHubConfig
from control_service.app.lookups import newest_job_id
from control_service.app.node_monitor import NodeMonitorConfig
from control_service.app.runtime import RetentionConfig, Runtime, RuntimeConfig
from control_service.config import Settings
from control_service.data_directory import Taken
from tunesmith.control.v1 import (
    artifact_service_pb2_grpc,
    dataset_service_pb2_grpc,
    inference_service_pb2_grpc,
    job_service_pb2_grpc,
    model_service_pb2_grpc,
    node_service_pb2_grpc,
    project_service_pb2_grpc,
)

_LAST_ANSWERS_SECONDS: Final = 1.0
_LAST_WORDS_SECONDS: Final = 0.1
_LAST_CONNECTIONS_SECONDS: Final = 0.05


@dataclass(kw_only=True)
class Application:
    """The running parts, in the order in which they end."""

    server: grpc.aio.Server
    calls: CallInterceptor
    health: HealthReporter
    runtime: Runtime
    blobs: DiskBlobStore
    store: SqlStore
    settings: Settings
    # host:port as bound.
    address: str

    async def start(self) -> None:
        """Takes up live jobs, then serves."""
        await self.runtime.start(configured_nodes=[(node.name, node.address) for node in self.settings.node])
        await self.server.start()
        await self.health.start()

    async def stop(self) -> None:
        """Says so, ends watches, lets open calls finish within the grace, then ends what they stood on."""
        async with AsyncExitStack() as parts:
            # Ended from the last to the first; one that fails keeps no other from ending.
            parts.push_async_callback(self.store.close)
            parts.push_async_callback(self.blobs.close)
            parts.push_async_callback(self.runtime.stop)
            parts.push_async_callback(self._end_calls)
            parts.callback(self.runtime.drain)
            parts.push_async_callback(self.health.drain)

    async def _end_calls(self) -> None:
        self.calls.drain()
        await self._until_idle(self.settings.grace_seconds)
        # Watches of health are still to say that nothing is served.
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        self.calls.cut()
        await self._until_idle(_LAST_ANSWERS_SECONDS)
        # Before the server stops: what it has not begun to serve would be told CANCELLED.
        port = int(self.address.rpartition(":")[2])
        refuse_new(port)
        hang_up(port)
        # What the kernel had taken before, grpc has by now.
        await asyncio.sleep(_LAST_CONNECTIONS_SECONDS)
        hang_up(port)
        await self.server.stop(_LAST_ANSWERS_SECONDS)

    async def _until_idle(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.calls.until_idle()


async def build(settings: Settings) -> Application:
    """Everything, wired and bound to its port, with nothing running. Taken: the port is another process's."""
    calls = CallInterceptor(config=CallConfig(stalled_reader_seconds=settings.stalled_reader_seconds))
    server = grpc.aio.server(
        options=SERVER_OPTIONS,
        maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
    )
    address = _bind(server, settings.address)
    clock, codec = SystemClock(), ProtoEventCodec()
    blobs = DiskBlobStore(directory=settings.data_directory / "blobs", output_root=settings.output_directory)
    await blobs.open()
    store = await SqlStore.open(settings.data_directory / DATABASE_NAME)
    runtime = Runtime(
        store=store,
        dialer=GrpcNodeDialer(config=NodeClientConfig()),
        codec=codec,
        blobs=blobs,
        clock=clock,
        config=_runtime_config(settings),
    )
    dataset_limits = DatasetLimits(max_dataset_bytes=settings.max_dataset_bytes)
    dependencies = Dependencies(
        store=store,
        blobs=blobs,
        imports=DirectoryImportRoot(settings.import_root),
        nodes=runtime.nodes,
        queue=runtime.queue,
        hub=runtime.hub,
        codec=codec,
        clock=clock,
        ids=system_ids(newest=await newest_job_id(store)),
        pages=PageTokens(secret=store.installation_id),
        files=DatasetFileReader(
            limits=dataset_limits.files, spool_directory=settings.data_directory / "blobs" / "staging"
        ),
        dataset_limits=dataset_limits,
        turns=ReadTurns(max_reads=settings.max_dataset_reads),
        config=EdgeConfig(upload_idle_seconds=settings.upload_idle_seconds, max_watches=settings.max_watches),
    )
    health = HealthReporter(store=store, clock=clock)
    services = register_services(server, dependencies, calls=calls, health=health)
    reflection.enable_server_reflection((*services, reflection.SERVICE_NAME), server)
    return Application(
        server=server,
        calls=calls,
        health=health,
        runtime=runtime,
        blobs=blobs,
        store=store,
        settings=settings,
        address=address,
    )


def register_services(
    server: grpc.aio.Server, dependencies: Dependencies, *, calls: CallInterceptor, health: HealthReporter
) -> tuple[str, ...]:
    """Adds every service of the contract, and health; their full names."""
    handlers = register(
        server,
        (project_service_pb2_grpc.add_ProjectServiceServicer_to_server, ProjectServicer(dependencies)),
        (dataset_service_pb2_grpc.add_DatasetServiceServicer_to_server, DatasetServicer(dependencies)),
        (model_service_pb2_grpc.add_ModelServiceServicer_to_server, ModelServicer(dependencies)),
        (job_service_pb2_grpc.add_JobServiceServicer_to_server, JobServicer(dependencies)),
        (artifact_service_pb2_grpc.add_ArtifactServiceServicer_to_server, ArtifactServicer(dependencies)),
        (node_service_pb2_grpc.add_NodeServiceServicer_to_server, NodeServicer(dependencies)),
        (inference_service_pb2_grpc.add_InferenceServiceServicer_to_server, InferenceServicer(dependencies)),
        (health_pb2_grpc.add_HealthServicer_to_server, health.servicer),
        wrap=calls.wrap,
    )
    health.report_for(service for service in handlers if service != HEALTH)
    return tuple(handlers)


def _runtime_config(settings: Settings) -> RuntimeConfig:
    return RuntimeConfig(
        nodes=NodeMonitorConfig(
            lease_seconds=settings.node_lease_seconds, heartbeat_seconds=settings.node_heartbeat_seconds
        ),
        events=EventHubConfig(heartbeat_seconds=settings.heartbeat_seconds),
        retention=RetentionConfig(
            release_runs=settings.release_runs,
            replicate_checkpoint_max_bytes=settings.replicate_checkpoint_max_bytes,
            events=timedelta(days=settings.event_retention_days),
        ),
    )


def _bind(server: grpc.aio.Server, address: str) -> str:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise Taken(f"address {address} cannot be bound; another process may serve there") from error
    return f"{address.rpartition(':')[0]}:{port}"
