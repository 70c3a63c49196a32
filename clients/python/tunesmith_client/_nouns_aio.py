"""What an asyncio client can do, by noun. Builds requests and unpacks answers; calls go through the AsyncCaller.

Every method raises TunesmithError's subclasses as the service's RPC comments say. Mutating methods take a request_id;
when it is left out one is made, so that repeats after a lost connection are safe.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from tunesmith.common.v1 import event_pb2, plan_pb2
from tunesmith.control.v1 import (
    artifact_service_pb2,
    artifact_service_pb2_grpc,
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    project_service_pb2,
    project_service_pb2_grpc,
)
from tunesmith_client._caller_aio import AsyncCaller
from tunesmith_client._cursor import Cursor
from tunesmith_client._errors import NotFound
from tunesmith_client._outcome import job_result
from tunesmith_client._transfer import (
    PartFile,
    ProgressCallback,
    destination_of,
    ignore_progress,
    upload_header,
    upload_parts,
    upload_seconds,
)
from tunesmith_client._watch_aio import watch

PAGE_SIZE = 200


class AsyncProjects:
    """What people want trained."""

    def __init__(self, channel: grpc.aio.Channel, caller: AsyncCaller) -> None:
        self._stub: project_service_pb2_grpc.ProjectServiceAsyncStub = project_service_pb2_grpc.ProjectServiceStub(
            channel
        )
        self._call = caller.call

    async def create(
        self, project: project_service_pb2.Project, *, request_id: str = ""
    ) -> project_service_pb2.Project:
        """Stores a project; gives it back with its id."""
        request = project_service_pb2.CreateProjectRequest(project=project, request_id=request_id)
        return (await self._call(self._stub.CreateProject, request)).project

    async def get(self, project_id: int) -> project_service_pb2.Project:
        """Reads one project."""
        return (
            await self._call(self._stub.GetProject, project_service_pb2.GetProjectRequest(project_id=project_id))
        ).project

    async def list(self, *, name_contains: str = "") -> AsyncIterator[project_service_pb2.Project]:
        """All projects by id, fetched page by page while you iterate."""
        request = project_service_pb2.ListProjectsRequest(page_size=PAGE_SIZE, name_contains=name_contains)
        while True:
            page = await self._call(self._stub.ListProjects, request)
            for item in page.projects:
                yield item
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def update(
        self, project: project_service_pb2.Project, *, fields: Iterable[str] = (), request_id: str = ""
    ) -> project_service_pb2.Project:
        """Replaces the named top-level fields (all when none is named). Aborted when `project.etag` is stale."""
        request = project_service_pb2.UpdateProjectRequest(
            project=project, update_mask=FieldMask(paths=list(fields)), request_id=request_id
        )
        return (await self._call(self._stub.UpdateProject, request)).project

    async def delete(self, project_id: int, *, request_id: str = "") -> None:
        """Deletes a project that has no live job."""
        request = project_service_pb2.DeleteProjectRequest(project_id=project_id, request_id=request_id)
        await self._call(self._stub.DeleteProject, request)


class AsyncDatasets:
    """Immutable sets of examples."""

    def __init__(self, channel: grpc.aio.Channel, caller: AsyncCaller) -> None:
        self._stub: dataset_service_pb2_grpc.DatasetServiceAsyncStub = dataset_service_pb2_grpc.DatasetServiceStub(
            channel
        )
        self._caller = caller
        self._call = caller.call

    async def upload(
        self, path: str | Path, *, name: str, format: str = "", progress: ProgressCallback = ignore_progress
    ) -> dataset_service_pb2.Dataset:
        """Uploads a file and registers it. The same name and content again give the first answer again.

        Raises OSError when the file cannot be read. `progress` is called from a worker thread.
        """
        file = Path(path)
        header = await asyncio.to_thread(upload_header, file, name, format)
        ends_at = time.monotonic() + upload_seconds(header.size_bytes)

        async def parts() -> AsyncIterator[dataset_service_pb2.UploadDatasetRequest]:
            source = upload_parts(file, header, progress)
            while (part := await asyncio.to_thread(next, source, None)) is not None:
                yield part

        async def send() -> dataset_service_pb2.UploadDatasetResponse:
            return await self._stub.UploadDataset(parts(), timeout=max(0.001, ends_at - time.monotonic()))

        return (await self._caller.repeat(send, ends_at=ends_at)).dataset

    async def register(self, name: str, path: str, *, format: str = "") -> dataset_service_pb2.Dataset:
        """Registers a file that lies below the service's import root."""
        request = dataset_service_pb2.RegisterDatasetRequest(name=name, path=path, format=format)
        return (await self._call(self._stub.RegisterDataset, request)).dataset

    async def get(self, dataset_id: int) -> dataset_service_pb2.Dataset:
        """Reads one dataset's record."""
        return (
            await self._call(self._stub.GetDataset, dataset_service_pb2.GetDatasetRequest(dataset_id=dataset_id))
        ).dataset

    async def find(self, name: str) -> dataset_service_pb2.Dataset:
        """The dataset of exactly this name. NotFound when there is none."""
        async for dataset in self.list(name_contains=name):
            if dataset.name == name:
                return dataset
        raise NotFound(f"no dataset is named {name!r}", reason="DATASET_NOT_FOUND", code=grpc.StatusCode.NOT_FOUND)

    async def list(self, *, name_contains: str = "") -> AsyncIterator[dataset_service_pb2.Dataset]:
        """All datasets by id, fetched page by page while you iterate."""
        request = dataset_service_pb2.ListDatasetsRequest(page_size=PAGE_SIZE, name_contains=name_contains)
        while True:
            page = await self._call(self._stub.ListDatasets, request)
            for item in page.datasets:
                yield item
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def preview(self, dataset_id: int, *, num_rows: int = 5) -> Sequence[dataset_service_pb2.DatasetRow]:
        """The first rows as they are in the file."""
        request = dataset_service_pb2.PreviewDatasetRequest(dataset_id=dataset_id, num_rows=num_rows)
        return (await self._call(self._stub.PreviewDataset, request)).rows

    async def delete(self, dataset_id: int, *, request_id: str = "") -> None:
        """Deletes a dataset that nothing uses."""
        request = dataset_service_pb2.DeleteDatasetRequest(dataset_id=dataset_id, request_id=request_id)
        await self._call(self._stub.DeleteDataset, request)


class AsyncModels:
    """Base models of the nodes."""

    def __init__(self, channel: grpc.aio.Channel, caller: AsyncCaller) -> None:
        self._stub: model_service_pb2_grpc.ModelServiceAsyncStub = model_service_pb2_grpc.ModelServiceStub(channel)
        self._call = caller.call

    async def list(self) -> AsyncIterator[model_service_pb2.Model]:
        """All models by name, fetched page by page while you iterate."""
        request = model_service_pb2.ListModelsRequest(page_size=PAGE_SIZE)
        while True:
            page = await self._call(self._stub.ListModels, request)
            for item in page.models:
                yield item
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def get(self, name: str) -> model_service_pb2.Model:
        """Reads one model. NotFound has the names that are there in `metadata["available_models"]`."""
        return (await self._call(self._stub.GetModel, model_service_pb2.GetModelRequest(name=name))).model

    async def types(self) -> Sequence[model_service_pb2.ModelType]:
        """The families that the nodes can train."""
        return (await self._call(self._stub.ListModelTypes, model_service_pb2.ListModelTypesRequest())).model_types


class AsyncJobs:
    """Requests to train."""

    def __init__(self, channel: grpc.aio.Channel, caller: AsyncCaller) -> None:
        self._stub: job_service_pb2_grpc.JobServiceAsyncStub = job_service_pb2_grpc.JobServiceStub(channel)
        self._config = caller.config
        self._call = caller.call

    async def plan(
        self, project_id: int, *, level: "plan_pb2.PlanLevel.ValueType" = plan_pb2.PLAN_LEVEL_EXACT
    ) -> job_service_pb2.PlanTrainingResponse:
        """Resolves everything without loading a weight. The answer has `plan` and the `node` that planned."""
        request = job_service_pb2.PlanTrainingRequest(project_id=project_id, level=level)
        return await self._call(self._stub.PlanTraining, request)

    async def start(
        self, project_id: int, *, priority: int = 0, max_retries: int | None = None, request_id: str = ""
    ) -> job_service_pb2.Job:
        """Stores a job, QUEUED. The same request_id gives the same job."""
        request = job_service_pb2.StartTrainingRequest(
            project_id=project_id, priority=priority, max_retries=max_retries, request_id=request_id
        )
        return (await self._call(self._stub.StartTraining, request)).job

    async def get(self, job_id: str) -> job_service_pb2.Job:
        """Reads one job with its queue position and why it waits."""
        return (await self._call(self._stub.GetJob, job_service_pb2.GetJobRequest(job_id=job_id))).job

    async def list(
        self,
        *,
        project_id: int = 0,
        states: "Iterable[event_pb2.JobState.ValueType]" = (),
    ) -> AsyncIterator[job_service_pb2.Job]:
        """Jobs, newest first, without their specs, fetched page by page while you iterate."""
        request = job_service_pb2.ListJobsRequest(page_size=PAGE_SIZE, project_id=project_id, states=list(states))
        while True:
            page = await self._call(self._stub.ListJobs, request)
            for item in page.jobs:
                yield item
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def cancel(self, job_id: str, *, request_id: str = "") -> job_service_pb2.Job:
        """Asks for the end of a job; one that is over is answered as it is."""
        request = job_service_pb2.CancelJobRequest(job_id=job_id, request_id=request_id)
        return (await self._call(self._stub.CancelJob, request)).job

    async def pause(self, job_id: str, *, request_id: str = "") -> job_service_pb2.Job:
        """Asks a running job to checkpoint and free its device."""
        request = job_service_pb2.PauseJobRequest(job_id=job_id, request_id=request_id)
        return (await self._call(self._stub.PauseJob, request)).job

    async def resume(self, job_id: str, *, request_id: str = "") -> job_service_pb2.Job:
        """Queues a paused job again."""
        request = job_service_pb2.ResumeJobRequest(job_id=job_id, request_id=request_id)
        return (await self._call(self._stub.ResumeJob, request)).job

    async def retry(self, job_id: str, *, request_id: str = "") -> job_service_pb2.Job:
        """Starts a new job with the snapshot of one that failed or was cancelled."""
        request = job_service_pb2.RetryJobRequest(job_id=job_id, request_id=request_id)
        return (await self._call(self._stub.RetryJob, request)).job

    async def delete(self, job_id: str, *, request_id: str = "") -> None:
        """Deletes a job that is over, with its log and artifacts."""
        request = job_service_pb2.DeleteJobRequest(job_id=job_id, request_id=request_id)
        await self._call(self._stub.DeleteJob, request)

    def watch(self, job_id: str, *, after_sequence: int = 0) -> AsyncIterator[event_pb2.Event]:
        """Iterates the job's events, history first, each once and in order, until it is over; reconnects itself."""
        cursor = Cursor(job_id=job_id, after_sequence=after_sequence, config=self._config)
        # A watch has no deadline: the silence limit notices a server that hangs.
        return watch(lambda request: self._stub.WatchJob(request), cursor, self._config.silence_limit_seconds)

    async def events(self, job_id: str, *, after_sequence: int = 0) -> AsyncIterator[event_pb2.Event]:
        """The events written so far, page by page; does not wait for more."""
        while True:
            request = job_service_pb2.ListJobEventsRequest(
                job_id=job_id, after_sequence=after_sequence, page_size=PAGE_SIZE
            )
            page = await self._call(self._stub.ListJobEvents, request)
            for item in page.events:
                yield item
            if not page.events or page.events[-1].sequence >= page.last_sequence:
                return
            after_sequence = page.events[-1].sequence

    async def checkpoints(self, job_id: str) -> Sequence[job_service_pb2.Checkpoint]:
        """The job's checkpoints by step."""
        request = job_service_pb2.ListCheckpointsRequest(job_id=job_id)
        return (await self._call(self._stub.ListCheckpoints, request)).checkpoints

    async def wait(
        self, job_id: str, *, check: bool = True, on_event: Callable[[event_pb2.Event], object] | None = None
    ) -> job_service_pb2.Job:
        """Watches until the job is over and gives it. With `check`, raises JobFailed unless it SUCCEEDED."""
        async for event in self.watch(job_id):
            if on_event is not None:
                on_event(event)
        return job_result(await self.get(job_id), check=check)


class AsyncArtifacts:
    """What jobs left."""

    def __init__(self, channel: grpc.aio.Channel, caller: AsyncCaller) -> None:
        self._stub: artifact_service_pb2_grpc.ArtifactServiceAsyncStub = artifact_service_pb2_grpc.ArtifactServiceStub(
            channel
        )
        self._caller = caller
        self._call = caller.call

    async def list(self, job_id: str) -> Sequence[artifact_service_pb2.Artifact]:
        """A job's collected artifacts."""
        return (
            await self._call(self._stub.ListArtifacts, artifact_service_pb2.ListArtifactsRequest(job_id=job_id))
        ).artifacts

    async def get(self, job_id: str, name: str) -> artifact_service_pb2.Artifact:
        """The artifact of this name. NotFound when there is none."""
        for artifact in await self.list(job_id):
            if artifact.name == name:
                return artifact
        message = f"job {job_id} has no artifact {name!r}"
        raise NotFound(message, reason="ARTIFACT_NOT_FOUND", code=grpc.StatusCode.NOT_FOUND)

    async def download(
        self, job_id: str, name: str, directory: str | Path, *, progress: ProgressCallback = ignore_progress
    ) -> Sequence[Path]:
        """Downloads every file of an artifact into `directory`, verified by SHA-256; what is there already stays.

        An interrupted download leaves `<file>.part` and goes on from there next time. Raises TransferDamaged.
        """
        artifact = await self.get(job_id, name)
        targets = [(destination_of(Path(directory), file), file) for file in artifact.files]
        return [await self._download_file(artifact, file, target, progress) for target, file in targets]

    async def delete(self, job_id: str, name: str, *, request_id: str = "") -> None:
        """Deletes an artifact's bytes and record."""
        request = artifact_service_pb2.DeleteArtifactRequest(job_id=job_id, name=name, request_id=request_id)
        await self._call(self._stub.DeleteArtifact, request)

    async def _download_file(
        self,
        artifact: artifact_service_pb2.Artifact,
        file: event_pb2.FileReference,
        target: Path,
        progress: ProgressCallback,
    ) -> Path:
        part = PartFile(target, file, progress)
        if await asyncio.to_thread(part.is_there):
            return target
        ends_at = time.monotonic() + upload_seconds(file.size_bytes)

        async def fetch_rest() -> None:
            request = artifact_service_pb2.DownloadArtifactRequest(
                job_id=artifact.job_id, name=artifact.name, path=file.path, offset=part.offset
            )
            timeout = max(0.001, ends_at - time.monotonic())
            async for response in self._stub.DownloadArtifact(request, timeout=timeout):
                await asyncio.to_thread(part.write, response.chunk)

        await asyncio.to_thread(part.open)
        try:
            if part.offset < file.size_bytes:
                await self._caller.repeat(fetch_rest, ends_at=ends_at)
            return await asyncio.to_thread(part.finish)
        finally:
            part.close()


class AsyncNodes:
    """The GPU services that control dials."""

    def __init__(self, channel: grpc.aio.Channel, caller: AsyncCaller) -> None:
        self._stub: node_service_pb2_grpc.NodeServiceAsyncStub = node_service_pb2_grpc.NodeServiceStub(channel)
        self._call = caller.call

    async def list(self) -> Sequence[node_service_pb2.Node]:
        """All nodes by name with what they last reported."""
        return (await self._call(self._stub.ListNodes, node_service_pb2.ListNodesRequest())).nodes

    async def register(self, name: str, address: str, *, request_id: str = "") -> node_service_pb2.Node:
        """Adds a node or changes its address."""
        request = node_service_pb2.RegisterNodeRequest(name=name, address=address, request_id=request_id)
        return (await self._call(self._stub.RegisterNode, request)).node

    async def drain(
        self, name: str, *, undo: bool = False, interrupt: bool = False, request_id: str = ""
    ) -> node_service_pb2.Node:
        """Gives a node no more jobs; with `interrupt`, its runs checkpoint and go back to the queue."""
        request = node_service_pb2.DrainNodeRequest(name=name, undo=undo, interrupt=interrupt, request_id=request_id)
        return (await self._call(self._stub.DrainNode, request)).node
