"""Projects, datasets, models and nodes for an asyncio client. Builds requests; calls go through the AsyncCaller.

Every method raises TunesmithError's subclasses as the service's RPC comments say. Mutating methods take a request_id;
when it is left out one is made, so that repeats after a lost connection are safe.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from tunesmith.control.v1 import (
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    project_service_pb2,
    project_service_pb2_grpc,
)
from tunesmith_client._caller_aio import AsyncCaller
from tunesmith_client._config import PAGE_SIZE, inspection_seconds
from tunesmith_client._errors import NotFound
from tunesmith_client._transfer import (
    ProgressCallback,
    ignore_progress,
    upload_header,
    upload_parts,
    upload_seconds,
)


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
        """Uploads a file (JSON lines, JSON, CSV, Parquet; compressed or not) and registers it. The same name and
        content again give the first answer again.

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

    async def get(self, dataset_id: int, *, base_model: str = "") -> dataset_service_pb2.Dataset:
        """Reads one dataset's record; with a base model also the tokens that it comes to, which a node counts."""
        request = dataset_service_pb2.GetDatasetRequest(dataset_id=dataset_id, base_model=base_model)
        return (
            await self._call(self._stub.GetDataset, request, default_seconds=inspection_seconds(base_model))
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

    async def preview(
        self,
        dataset_id: int,
        *,
        num_rows: int = 5,
        base_model: str = "",
        chat_template: str = "",
        loss_on: str = "",
        max_length: int = 0,
    ) -> Sequence[dataset_service_pb2.DatasetRow]:
        """The first rows as they are stored; with a base model each also as it will see it (`rendered`).

        The last three, as in a project's hyper-parameters, say how it is rendered; FailedPrecondition when no node has
        the base or it has no chat template that the rows need.
        """
        request = dataset_service_pb2.PreviewDatasetRequest(
            dataset_id=dataset_id,
            num_rows=num_rows,
            base_model=base_model,
            chat_template=chat_template,
            loss_on=loss_on,
            max_length=max_length,
        )
        return (
            await self._call(self._stub.PreviewDataset, request, default_seconds=inspection_seconds(base_model))
        ).rows

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
