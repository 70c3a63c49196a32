"""A control service for tests: in this process on port 0, or as a process of its own; with stubs and a few chores."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from control_service.bootstrap import build
from control_service.config import NodeAddress, Settings
from tests.fakes.gpu_node import MODEL, FakeGpuNode
from tunesmith.common.v1 import event_pb2, generation_pb2, training_spec_pb2
from tunesmith.control.v1 import (
    artifact_service_pb2_grpc,
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
    model_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    project_service_pb2,
    project_service_pb2_grpc,
)

PATIENCE_SECONDS = 60.0
ROWS = "".join(json.dumps({"prompt": f"q{number}", "completion": f"a{number}"}) + "\n" for number in range(8)).encode()


class Client:
    """Stubs over one channel."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = grpc.aio.insecure_channel(address)
        self.projects: Any = project_service_pb2_grpc.ProjectServiceStub(self.channel)
        self.datasets: Any = dataset_service_pb2_grpc.DatasetServiceStub(self.channel)
        self.models: Any = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.jobs: Any = job_service_pb2_grpc.JobServiceStub(self.channel)
        self.artifacts: Any = artifact_service_pb2_grpc.ArtifactServiceStub(self.channel)
        self.nodes: Any = node_service_pb2_grpc.NodeServiceStub(self.channel)
        self.inference: Any = inference_service_pb2_grpc.InferenceServiceStub(self.channel)

    async def upload(self, name: str, content: bytes = ROWS, /, **header: Any) -> Any:
        """Uploads a dataset in small chunks."""
        head = {"name": name, "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **header}
        request = dataset_service_pb2.UploadDatasetRequest

        async def requests() -> AsyncIterator[Any]:
            yield request(header=dataset_service_pb2.UploadDatasetHeader(**head))
            for start in range(0, len(content), 64):
                yield request(chunk=content[start : start + 64])

        response = await self.datasets.UploadDataset(requests(), timeout=PATIENCE_SECONDS)
        return response.dataset

    async def create_project(self, *, dataset_id: int, name: str = "first", **fields: Any) -> Any:
        """Stores a project with one trait."""
        response = await self.projects.CreateProject(
            project_service_pb2.CreateProjectRequest(project=project(dataset_id=dataset_id, name=name, **fields)),
            timeout=PATIENCE_SECONDS,
        )
        return response.project

    async def start_training(self, project_id: int, **fields: Any) -> Any:
        """Queues a job."""
        response = await self.jobs.StartTraining(
            job_service_pb2.StartTrainingRequest(project_id=project_id, **fields), timeout=PATIENCE_SECONDS
        )
        return response.job

    async def job(self, job_id: str) -> Any:
        """Reads a job."""
        response = await self.jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job_id), timeout=PATIENCE_SECONDS)
        return response.job

    async def events(self, job_id: str, *, after_sequence: int = 0) -> AsyncIterator[Any]:
        """Events of a watch, heartbeats left out."""
        request = job_service_pb2.WatchJobRequest(job_id=job_id, after_sequence=after_sequence)
        async for response in self.jobs.WatchJob(request, timeout=PATIENCE_SECONDS):
            for event in response.events:
                yield event

    def generate(self, content: str = "hello", **fields: Any) -> Any:
        """A stream of an answer to one user's message."""
        messages = [generation_pb2.ChatMessage(role="user", content=content)]
        request = inference_service_pb2.GenerateRequest(**{"messages": messages, **fields})
        return self.inference.Generate(request, timeout=PATIENCE_SECONDS)

    async def until_event(
        self, job_id: str, wanted: Callable[[Any], bool], *, after_sequence: int = 0
    ) -> Sequence[Any]:
        """Events up to and including the first wanted one."""
        seen = []
        async for event in self.events(job_id, after_sequence=after_sequence):
            seen.append(event)
            if wanted(event):
                return seen
        raise AssertionError(f"the log ended without the wanted event: {seen}")

    async def until_node_reachable(self, name: str = "fake") -> Any:
        """Waits until control has heard of a node and of what it has."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                response = await self.nodes.ListNodes(node_service_pb2.ListNodesRequest())
                for node in response.nodes:
                    if node.name == name and node.state == node_service_pb2.NODE_STATE_REACHABLE and node.versions:
                        return node
                await asyncio.sleep(0.02)

    async def close(self) -> None:
        await self.channel.close()


def project(*, dataset_id: int, name: str = "first", **fields: Any) -> project_service_pb2.Project:
    """A legal project."""
    values: dict[str, Any] = {
        "name": name,
        "base_model": MODEL,
        "model_type": "llama",
        "training_type": "qlora",
        "output_directory": "./output/test",
        "traits": [
            training_spec_pb2.Trait(
                trait_type="reasoning",
                datasets=[training_spec_pb2.TraitDataset(dataset_id=dataset_id, percentage=100)],
            )
        ],
        **fields,
    }
    return project_service_pb2.Project(**values)


async def until(condition: Callable[[], bool]) -> None:
    """Waits, with bounded patience, for something that gives no sign of itself: files on disk."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0.02)


def is_state(state: int) -> Callable[[Any], bool]:
    """Whether an event says that the job is in this state."""
    return lambda event: event.kind == event_pb2.EVENT_KIND_JOB_STATE and event.payload.job_state.state == state


def is_step(step: int) -> Callable[[Any], bool]:
    """Whether an event is this step's."""
    return lambda event: event.kind == event_pb2.EVENT_KIND_STEP and event.payload.step.step == step


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The ErrorInfo reason of a failed call."""
    return error_info(error).reason


def error_info(error: grpc.aio.AioRpcError) -> Any:
    """The ErrorInfo of a failed call."""
    return _detail(error, error_details_pb2.ErrorInfo)


def violated_fields(error: grpc.aio.AioRpcError) -> list[str]:
    """Fields that BadRequest names."""
    return [violation.field for violation in _detail(error, error_details_pb2.BadRequest).field_violations]


def _detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # reads what AioRpcError has too
    assert status is not None, error
    for detail in status.details:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    raise AssertionError(f"{kind.DESCRIPTOR.name} is missing in {status}")


def settings(data_directory: Path, node: FakeGpuNode | None, **fields: Any) -> Settings:
    """Settings for a test: port 0, quick heartbeats."""
    nodes = (NodeAddress(name=node.name, address=node.address),) if node else ()
    values = {"heartbeat_seconds": 0.5, "node_heartbeat_seconds": 0.5, "grace_seconds": 5.0, **fields}
    return Settings(address="127.0.0.1:0", data_directory=data_directory, node=nodes, **values)


@asynccontextmanager
async def control(
    data_directory: Path, node: FakeGpuNode | None = None, *, nodes: Sequence[NodeAddress] = (), **fields: Any
) -> AsyncIterator[Client]:
    """A control service in this process, and a client of it; `nodes` instead of one `node`."""
    chosen = settings(data_directory, node, **fields)
    application = await build(chosen.model_copy(update={"node": tuple(nodes)}) if nodes else chosen)
    try:
        await application.start()
        client = Client(application.address)
        try:
            yield client
        finally:
            await client.close()
    finally:
        await application.stop()


class ControlProcess:
    """A control service as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, ready_file: Path, errors: Path) -> None:
        self.process = process
        self.ready_file = ready_file
        self.errors = errors

    @classmethod
    async def start(cls, directory: Path, *flags: str, environment: Mapping[str, str] | None = None) -> ControlProcess:
        """Starts it, on port 0 unless a flag says otherwise; does not wait."""
        ready_file, errors = directory / "ready.json", directory / f"stderr-{os.urandom(3).hex()}.log"
        with errors.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "control_service",
                *("--address", "127.0.0.1:0", "--data-directory", str(directory / "control")),
                *("--ready-file", str(ready_file), "--node", "", *flags),
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
            )
        return cls(process, ready_file, errors)

    async def until_ready(self) -> str:
        """Waits until it serves; its address."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                if self.process.returncode is not None:
                    raise AssertionError(f"exit {self.process.returncode}: {self.errors.read_text()}")
                if self.ready_file.exists():
                    ready = json.loads(self.ready_file.read_text())
                    if ready["pid"] == self.process.pid:
                        return str(ready["address"])
                await asyncio.sleep(0.05)

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and waits; the exit code."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.exit_code()

    async def exit_code(self) -> int:
        """Waits for the end."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.process.wait()
