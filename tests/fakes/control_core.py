"""A whole control core on a database file and fake nodes, with quick settings; can be stopped and built again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from control_service.adapters.clock import SystemClock, system_ids
from control_service.adapters.files.reader import DatasetFileReader
from control_service.adapters.sql.store import SqlStore
from control_service.app import datasets, exports, jobs, projects, training
from control_service.app.back_off import BackOffConfig
from control_service.app.collector import CollectorConfig
from control_service.app.dataset_intake import DatasetLimits, ReadTurns
from control_service.app.event_hub import EventHubConfig
from control_service.app.idempotency import RequestKey
from control_service.app.lookups import newest_job_id
from control_service.app.node_monitor import NodeMonitorConfig
from control_service.app.ports import Clock
from control_service.app.runtime import RetentionConfig, Runtime, RuntimeConfig
from control_service.app.start_points import StartRequest
from control_service.domain.dataset import Dataset
from control_service.domain.event import Fact, StoredEvent
from control_service.domain.job import Job, JobView
from control_service.domain.job_state import JobState
from control_service.domain.project import Project, ProjectDraft
from control_service.domain.spec import Trait, TraitDataset
from tests.fakes.control_blobs import MemoryBlobStore
from tests.fakes.control_codec import PickleCodec, page_of
from tests.fakes.control_node import FakeNode
from tests.fakes.control_node_client import FakeDialer

LIMITS = DatasetLimits()


def quick_config(retention: RetentionConfig | None = None) -> RuntimeConfig:
    back_off = BackOffConfig(initial_seconds=0.01, max_seconds=0.05)
    return RuntimeConfig(
        nodes=NodeMonitorConfig(heartbeat_seconds=0.2, capabilities_refresh_seconds=0.5, back_off=back_off),
        events=EventHubConfig(heartbeat_seconds=0.2, max_page_events=8),
        retention=retention or RetentionConfig(),
        collector=CollectorConfig(pause_seconds=0.01),
        back_off=back_off,
    )


async def until(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    """Waits for a condition, bounded."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nothing tells a test of the change
            await asyncio.sleep(0.005)


@dataclass
class Core:
    """Built by `open_core`."""

    database: Path
    nodes: tuple[FakeNode, ...]
    blobs: MemoryBlobStore = field(default_factory=MemoryBlobStore)
    clock: Clock = field(default_factory=SystemClock)
    config: RuntimeConfig = field(default_factory=quick_config)
    codec: PickleCodec = field(default_factory=PickleCodec)
    # False: no node is in the settings.
    configure: bool = True
    turns: ReadTurns = field(default_factory=lambda: ReadTurns(max_reads=2))
    # Nodes that can be dialed and are not in the settings.
    not_configured: set[str] = field(default_factory=set)

    async def open(self) -> None:
        self.store = await SqlStore.open(self.database)
        self.ids = system_ids(newest=await newest_job_id(self.store))
        self.runtime = Runtime(
            store=self.store,
            dialer=FakeDialer(*self.nodes),
            codec=self.codec,
            blobs=self.blobs,
            clock=self.clock,
            config=self.config,
        )
        pairs = [(n.name, n.name) for n in self.nodes if self.configure and n.name not in self.not_configured]
        await self.runtime.start(configured_nodes=pairs)

    async def close(self) -> None:
        await self.runtime.stop()
        await self.store.close()

    async def restart(self) -> None:
        await self.close()
        await self.open()

    async def reachable(self, *names: str) -> None:
        wanted = set(names or {node.name for node in self.nodes})
        await until(lambda: wanted <= {v.node.name for v in self.runtime.nodes.views() if v.is_reachable})

    # Use cases with the ports filled in.

    async def dataset(self, name: str = "set", *, num_rows: int = 3) -> Dataset:
        data = b"".join(json.dumps({"text": f"{name} {n}"}).encode() + b"\n" for n in range(num_rows))
        return await self.upload(name, data)

    async def upload(self, name: str, data: bytes, *, format: str = "") -> Dataset:
        reference = MemoryBlobStore().add(data)
        header = datasets.UploadHeader(name=name, sha256=reference.sha256, size_bytes=len(data), format=format)
        return await datasets.upload_dataset(
            header,
            _chunks(data),
            store=self.store,
            blobs=self.blobs,
            files=DatasetFileReader(limits=LIMITS.files, spool_directory=self.database.parent),
            clock=self.clock,
            limits=LIMITS,
            turns=self.turns,
        )

    async def project(self, name: str = "project", *, base_model: str = "org/base") -> Project:
        dataset = await self.dataset(f"{name}-set")
        return await projects.create_project(
            draft(name, dataset.dataset_id, base_model=base_model), store=self.store, clock=self.clock
        )

    async def start(
        self,
        project_id: int,
        *,
        request: RequestKey | None = None,
        priority: int = 0,
        max_retries: int = 2,
        start: StartRequest | None = None,
        timeout_seconds: float | None = None,
    ) -> Job:
        view = await training.start_training(
            project_id,
            priority=priority,
            max_retries=max_retries,
            start=start,
            timeout_seconds=timeout_seconds,
            store=self.store,
            nodes=self.runtime.nodes,
            queue=self.runtime.queue,
            clock=self.clock,
            ids=self.ids,
            codec=self.codec,
            request=request,
        )
        return view.job

    async def export(self, job_id: str, *, request: RequestKey | None = None) -> Job:
        view = await exports.export_artifact(
            job_id,
            "merged",
            store=self.store,
            nodes=self.runtime.nodes,
            queue=self.runtime.queue,
            clock=self.clock,
            ids=self.ids,
            codec=self.codec,
            request=request,
        )
        return view.job

    async def retry(self, job_id: str) -> Job:
        view = await training.retry_job(
            job_id, store=self.store, queue=self.runtime.queue, clock=self.clock, ids=self.ids, codec=self.codec
        )
        return view.job

    async def view(self, job_id: str) -> JobView:
        return await jobs.get_job(job_id, store=self.store, queue=self.runtime.queue)

    async def cancel(self, job_id: str) -> Job:
        return (
            await jobs.cancel_job(
                job_id, store=self.store, queue=self.runtime.queue, clock=self.clock, codec=self.codec
            )
        ).job

    async def pause(self, job_id: str) -> Job:
        return (
            await jobs.pause_job(job_id, store=self.store, queue=self.runtime.queue, clock=self.clock, codec=self.codec)
        ).job

    async def resume(self, job_id: str) -> Job:
        return (
            await jobs.resume_job(
                job_id, store=self.store, queue=self.runtime.queue, clock=self.clock, codec=self.codec
            )
        ).job

    async def until_job(self, job_id: str, condition: Callable[[Job], bool], *, seconds: float = 30.0) -> Job:
        async with asyncio.timeout(seconds):
            while True:
                job = (await self.view(job_id)).job
                if condition(job):
                    return job
                await asyncio.sleep(0.005)

    async def until_state(self, job_id: str, state: JobState) -> Job:
        return await self.until_job(job_id, lambda job: job.state is state)

    async def running(self, job_id: str) -> Job:
        """Waits until the job runs and its first events have arrived."""
        return await self.until_job(job_id, lambda job: job.state is JobState.RUNNING and job.run_cursor > 0)

    async def log(self, job_id: str) -> list[StoredEvent]:
        page = await jobs.list_job_events(job_id, store=self.store, limit=100_000)
        return list(page.events)

    async def facts(self, job_id: str) -> list[Fact | None]:
        return [self.codec.decode(event.kind, event.payload) for event in await self.log(job_id)]

    async def watch(self, job_id: str, after: int = 0) -> list[StoredEvent]:
        """Everything that a watcher is given until the watch ends by itself."""
        events: list[StoredEvent] = []
        async for message in self.runtime.hub.watch(job_id, after_sequence=after):
            events += page_of(message)
        return events


def draft(name: str, *dataset_ids: int, base_model: str = "org/base") -> ProjectDraft:
    share = 100.0 / len(dataset_ids)
    return ProjectDraft(
        name=name,
        base_model=base_model,
        model_type="llama",
        training_type="qlora",
        output_directory="./out",
        traits=(
            Trait(
                trait_type="reasoning",
                datasets=tuple(TraitDataset(dataset_id=number, percentage=share) for number in dataset_ids),
            ),
        ),
    )


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]
