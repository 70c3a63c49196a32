"""The composition root: the only file that knows every concrete class. Builds, starts and stops; decides nothing."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass

import structlog
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gpu_service import doctor
from gpu_service.api.blobs import BlobServicer
from gpu_service.api.inference import InferenceServicer
from gpu_service.api.interceptors import CallInterceptor
from gpu_service.api.runs import RunServicer
from gpu_service.api.server_options import SERVER_OPTIONS
from gpu_service.catalog import weight_files
from gpu_service.config import Settings
from gpu_service.devices import DeviceMemory, ListDevices, list_devices
from gpu_service.domain.memory import MemoryLedger
from gpu_service.runs.admission import Admission
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.capabilities import CapabilityReader
from gpu_service.runs.engine_directories import EngineSettings, RecentModel
from gpu_service.runs.engine_pool import EnginePool
from gpu_service.runs.inference import InferenceDesk
from gpu_service.runs.inspection import Inspection
from gpu_service.runs.manager import RunManager
from gpu_service.runs.memory_records import MemoryRecords
from gpu_service.runs.models import ModelShelf
from gpu_service.runs.node_files import NodeFiles
from gpu_service.runs.planner_process import PlannerProcess
from gpu_service.runs.planning import Planning
from gpu_service.runs.probing import MemoryProber
from gpu_service.runs.quarantine import Quarantine
from tunesmith.gpu.v1 import (
    blob_service_pb2,
    blob_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    run_service_pb2,
    run_service_pb2_grpc,
)

_log = structlog.get_logger(__name__)
# What a shim needs beyond the grace to reap, record and close.
_AFTER_GRACE_SECONDS = 30.0
# A health service's name: whether the process should be restarted, for which a drain is no reason.
_LIVENESS = "liveness"
# For streams to take their last message.
_LAST_CALLS_SECONDS = 5.0


class PortTaken(Exception):
    """Another process listens on the address."""


@dataclass(kw_only=True)
class Application:
    """The running parts."""

    settings: Settings
    server: aio.Server
    health: health.aio.HealthServicer
    services: tuple[str, ...]
    manager: RunManager
    desk: InferenceDesk
    models: ModelShelf
    # host:port as it is reached.
    address: str

    async def start(self) -> None:
        """Take up what a former server left, then serve."""
        await self.manager.open()
        await self.server.start()
        for service in (_LIVENESS, "", *self.services):
            await self.health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """Refuse new work, end or leave the engines, let streams take their last message, and stop."""
        for service in ("", *self.services):
            await self.health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        self.manager.begin_draining()
        self.desk.drain()
        try:
            async with asyncio.timeout(self.settings.grace_seconds + _AFTER_GRACE_SECONDS):
                await self.desk.until_placed()
                if not self.settings.keep_engines:
                    await self.manager.drain(self.settings.grace_seconds)
        except TimeoutError:
            # Shims outlive this process; the next one adopts or buries them.
            _log.error("drain-unfinished")
        self.manager.finish()
        await self.server.stop(_LAST_CALLS_SECONDS)
        await self.desk.close()
        await self.manager.close()
        await self.models.close()


async def build(
    settings: Settings, *, devices: ListDevices = list_devices, memory_of_devices: DeviceMemory | None = None
) -> Application:
    """Wire everything and bind the port. Raises PortTaken, OSError, ValueError for a `node.json` that is not ours."""
    files = NodeFiles(settings.data_directory, settings.models_directory)
    await asyncio.to_thread(files.prepare)
    facts = await asyncio.to_thread(files.read_facts, settings.name)
    versions = await asyncio.to_thread(doctor.read_versions)
    problems = doctor.find_problems(versions)
    for problem in problems:
        _log.error("node-cannot-train", library=problem.library, version=problem.version, install=problem.install)

    engine_settings = EngineSettings(
        command=settings.engine_command,
        orphan_limit_seconds=settings.orphan_limit_seconds,
        grace_seconds=settings.grace_seconds,
        idle_seconds=settings.engine_idle_seconds,
        hang_limit_seconds=settings.hang_limit_seconds,
        answer_limit_seconds=settings.shim_answer_seconds,
        memory=memory_of_devices or DeviceMemory(),
        spare_engines=settings.spare_engines,
        kernels_directory=files.kernels,
        recent_model=RecentModel(directory=await asyncio.to_thread(files.find_likely_model)),
    )
    ledger = MemoryLedger()
    blobs = BlobStore(files.blobs)
    models = ModelShelf(files.models, cache_file=files.cache / weight_files.CACHE_FILE)
    planner = PlannerProcess(files.requests)
    memory = await asyncio.to_thread(MemoryRecords, files.memory_records)
    planning = Planning(
        files=files,
        models=models,
        blobs=blobs,
        planner=planner,
        versions=versions,
        memory=memory,
        taken_host_bytes=ledger.host_bytes_beside,
    )
    quarantine = Quarantine()
    pool = EnginePool(directory=files.engines, settings=engine_settings, quarantine=quarantine)
    admission = Admission(
        planning=planning,
        ledger=ledger,
        list_devices=devices,
        problems=problems,
        evictable_bytes=pool.resident_bytes,
        quarantine_reason=quarantine.reason,
    )
    manager = RunManager(
        files=files,
        facts=facts,
        admission=admission,
        ledger=ledger,
        memory=memory,
        blobs=blobs,
        pool=pool,
        planning=planning,
        grace_seconds=settings.grace_seconds,
        cache_max_bytes=settings.cache_max_bytes,
    )
    quarantine.changed = manager.changed.fire
    desk = InferenceDesk(
        files=files,
        planning=planning,
        admission=admission,
        ledger=ledger,
        blobs=blobs,
        pool=pool,
        manager=manager,
    )

    prober = MemoryProber(
        planning=planning,
        ledger=ledger,
        records=memory,
        directory=files.requests,
        make_room=pool.make_room,
        on_release=manager.changed.fire,
    )
    calls = CallInterceptor(stalled_reader_seconds=settings.stalled_reader_seconds)
    server = aio.server(interceptors=[calls], options=SERVER_OPTIONS)
    run_servicer = RunServicer(
        manager=manager,
        admission=admission,
        planning=planning,
        prober=prober,
        inspection=Inspection(files=files, models=models, blobs=blobs, planner=planner),
        capabilities=CapabilityReader(admission=admission, models=models, versions=versions),
        node_name=settings.name,
        instance_id=uuid.uuid4().hex,
    )
    run_service_pb2_grpc.add_RunServiceServicer_to_server(run_servicer, server)
    blob_service_pb2_grpc.add_BlobServiceServicer_to_server(BlobServicer(blobs=blobs, manager=manager), server)
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(desk=desk), server)
    services = (
        run_service_pb2.DESCRIPTOR.services_by_name["RunService"].full_name,
        blob_service_pb2.DESCRIPTOR.services_by_name["BlobService"].full_name,
        inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    )
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return Application(
        settings=settings,
        server=server,
        health=health_servicer,
        services=services,
        manager=manager,
        desk=desk,
        models=models,
        address=_bind(server, settings.address),
    )


def _bind(server: aio.Server, address: str) -> str:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise PortTaken(f"cannot listen on {address}: {error}") from error
    return f"{address.rpartition(':')[0]}:{port}"
