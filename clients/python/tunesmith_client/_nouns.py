"""Projects, datasets, models and nodes for a blocking client. Builds requests; calls go through the Caller.

Every method raises TunesmithError's subclasses as the service's RPC comments say. Mutating methods take a request_id;
when it is left out one is made, so that repeats after a lost connection are safe.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
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
from tunesmith_client._caller import Caller
from tunesmith_client._config import PAGE_SIZE, inspection_seconds
from tunesmith_client._errors import NotFound
from tunesmith_client._transfer import (
    ProgressCallback,
    ignore_progress,
    upload_header,
    upload_parts,
    upload_seconds,
)


class Projects:
    """What people want trained."""

    def __init__(self, channel: grpc.Channel, caller: Caller) -> None:
        self._stub = project_service_pb2_grpc.ProjectServiceStub(channel)
        self._call = caller.call

    def create(self, project: project_service_pb2.Project, *, request_id: str = "") -> project_service_pb2.Project:
        """Stores a project; gives it back with its id."""
        request = project_service_pb2.CreateProjectRequest(project=project, request_id=request_id)
        return self._call(self._stub.CreateProject, request).project

    def get(self, project_id: int) -> project_service_pb2.Project:
        """Reads one project."""
        return self._call(self._stub.GetProject, project_service_pb2.GetProjectRequest(project_id=project_id)).project

    def list(self, *, name_contains: str = "") -> Iterator[project_service_pb2.Project]:
        """All projects by id, fetched page by page while you iterate."""
        request = project_service_pb2.ListProjectsRequest(page_size=PAGE_SIZE, name_contains=name_contains)
        while True:
            page = self._call(self._stub.ListProjects, request)
            yield from page.projects
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def update(
        self, project: project_service_pb2.Project, *, fields: Iterable[str] = (), request_id: str = ""
    ) -> project_service_pb2.Project:
        """Replaces the named top-level fields (all when none is named). Aborted when `project.etag` is stale."""
        request = project_service_pb2.UpdateProjectRequest(
            project=project, update_mask=FieldMask(paths=list(fields)), request_id=request_id
        )
        return self._call(self._stub.UpdateProject, request).project

    def delete(self, project_id: int, *, request_id: str = "") -> None:
        """Deletes a project that has no live job."""
        request = project_service_pb2.DeleteProjectRequest(project_id=project_id, request_id=request_id)
        self._call(self._stub.DeleteProject, request)


class Datasets:
    """Immutable sets of examples."""

    def __init__(self, channel: grpc.Channel, caller: Caller) -> None:
        self._stub = dataset_service_pb2_grpc.DatasetServiceStub(channel)
        self._caller = caller
        self._call = caller.call

    def upload(
        self, path: str | Path, *, name: str, format: str = "", progress: ProgressCallback = ignore_progress
    ) -> dataset_service_pb2.Dataset:
        """Uploads a file (JSON lines, JSON, CSV, Parquet; compressed or not) and registers it. The same name and
        content again give the first answer again.

        `progress` is called from gRPC's own thread. Raises OSError when the file cannot be read.
        """
        file = Path(path)
        header = upload_header(file, name, format)
        ends_at = time.monotonic() + upload_seconds(header.size_bytes)
        response = self._caller.repeat(
            lambda: self._stub.UploadDataset(
                upload_parts(file, header, progress), timeout=max(0.001, ends_at - time.monotonic())
            ),
            ends_at=ends_at,
        )
        return response.dataset

    def register(self, name: str, path: str, *, format: str = "") -> dataset_service_pb2.Dataset:
        """Registers a file that lies below the service's import root."""
        request = dataset_service_pb2.RegisterDatasetRequest(name=name, path=path, format=format)
        return self._call(self._stub.RegisterDataset, request).dataset

    def get(self, dataset_id: int, *, base_model: str = "") -> dataset_service_pb2.Dataset:
        """Reads one dataset's record; with a base model also the tokens that it comes to, which a node counts."""
        request = dataset_service_pb2.GetDatasetRequest(dataset_id=dataset_id, base_model=base_model)
        return self._call(self._stub.GetDataset, request, default_seconds=inspection_seconds(base_model)).dataset

    def find(self, name: str) -> dataset_service_pb2.Dataset:
        """The dataset of exactly this name. NotFound when there is none."""
        for dataset in self.list(name_contains=name):
            if dataset.name == name:
                return dataset
        raise NotFound(f"no dataset is named {name!r}", reason="DATASET_NOT_FOUND", code=grpc.StatusCode.NOT_FOUND)

    def list(self, *, name_contains: str = "") -> Iterator[dataset_service_pb2.Dataset]:
        """All datasets by id, fetched page by page while you iterate."""
        request = dataset_service_pb2.ListDatasetsRequest(page_size=PAGE_SIZE, name_contains=name_contains)
        while True:
            page = self._call(self._stub.ListDatasets, request)
            yield from page.datasets
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def preview(
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
        return self._call(self._stub.PreviewDataset, request, default_seconds=inspection_seconds(base_model)).rows

    def delete(self, dataset_id: int, *, request_id: str = "") -> None:
        """Deletes a dataset that nothing uses."""
        request = dataset_service_pb2.DeleteDatasetRequest(dataset_id=dataset_id, request_id=request_id)
        self._call(self._stub.DeleteDataset, request)


class Models:
    """Base models of the nodes."""

    def __init__(self, channel: grpc.Channel, caller: Caller) -> None:
        self._stub = model_service_pb2_grpc.ModelServiceStub(channel)
        self._call = caller.call

    def list(self) -> Iterator[model_service_pb2.Model]:
        """All models by name, fetched page by page while you iterate."""
        request = model_service_pb2.ListModelsRequest(page_size=PAGE_SIZE)
        while True:
            page = self._call(self._stub.ListModels, request)
            yield from page.models
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def get(self, name: str) -> model_service_pb2.Model:
        """Reads one model. NotFound has the names that are there in `metadata["available_models"]`."""
        return self._call(self._stub.GetModel, model_service_pb2.GetModelRequest(name=name)).model

    def types(self) -> Sequence[model_service_pb2.ModelType]:
        """The families that the nodes can train."""
        return self._call(self._stub.ListModelTypes, model_service_pb2.ListModelTypesRequest()).model_types


class Nodes:
    """The GPU services that control dials."""

    def __init__(self, channel: grpc.Channel, caller: Caller) -> None:
        self._stub = node_service_pb2_grpc.NodeServiceStub(channel)
        self._call = caller.call

    def list(self) -> Sequence[node_service_pb2.Node]:
        """All nodes by name with what they last reported."""
        return self._call(self._stub.ListNodes, node_service_pb2.ListNodesRequest()).nodes

    def register(self, name: str, address: str, *, request_id: str = "") -> node_service_pb2.Node:
        """Adds a node or changes its address."""
        request = node_service_pb2.RegisterNodeRequest(name=name, address=address, request_id=request_id)
        return self._call(self._stub.RegisterNode, request).node

    def drain(
        self, name: str, *, undo: bool = False, interrupt: bool = False, request_id: str = ""
    ) -> node_service_pb2.Node:
        """Gives a node no more jobs; with `interrupt`, its runs checkpoint and go back to the queue."""
        request = node_service_pb2.DrainNodeRequest(name=name, undo=undo, interrupt=interrupt, request_id=request_id)
        return self._call(self._stub.DrainNode, request).node
