"""Serves `DatasetService`: wire in, use case, wire out. Bytes pass through in chunks; rows are never read here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from control_service.api.deadline import seconds_for_nodes
from control_service.api.dependencies import Dependencies
from control_service.api.paging import cut_page, page_limit
from control_service.api.requests import request_key
from control_service.api.wire.datasets import dataset_message, rendering_of, row_message, upload_header
from control_service.app import dataset_inspection, datasets
from control_service.domain.errors import DeadlineTooShort, invalid_field
from tunesmith.control.v1 import dataset_service_pb2 as messages
from tunesmith.control.v1 import dataset_service_pb2_grpc

DEFAULT_PREVIEW_ROWS: Final = 5


class DatasetServicer(dataset_service_pb2_grpc.DatasetServiceServicer):
    """Datasets, towards clients."""

    def __init__(self, dependencies: Dependencies) -> None:
        self._on = dependencies

    async def UploadDataset(self, requests: AsyncIterator[messages.UploadDatasetRequest], context: Any) -> Any:
        """Takes a file in: a header, then chunks."""
        first = await self._next(requests)
        if first is None or first.WhichOneof("part") != "header":
            raise invalid_field("header", "must be the first message")
        dataset = await datasets.upload_dataset(
            upload_header(first.header),
            self._chunks(requests),
            store=self._on.store,
            blobs=self._on.blobs,
            files=self._on.files,
            clock=self._on.clock,
            limits=self._on.dataset_limits,
            turns=self._on.turns,
        )
        return messages.UploadDatasetResponse(dataset=dataset_message(dataset))

    async def RegisterDataset(self, request: messages.RegisterDatasetRequest, context: Any) -> Any:
        """Registers a file below the import root."""
        dataset = await datasets.register_dataset(
            request.name,
            request.path,
            format=request.format,
            store=self._on.store,
            blobs=self._on.blobs,
            imports=self._on.imports,
            files=self._on.files,
            clock=self._on.clock,
            limits=self._on.dataset_limits,
            turns=self._on.turns,
        )
        return messages.RegisterDatasetResponse(dataset=dataset_message(dataset))

    async def GetDataset(self, request: messages.GetDatasetRequest, context: Any) -> Any:
        """Reads one dataset's record; with a base model also its tokens."""
        if not request.base_model:
            dataset = await datasets.get_dataset(request.dataset_id, store=self._on.store)
            return messages.GetDatasetResponse(dataset=dataset_message(dataset))
        dataset, tokens = await dataset_inspection.count_tokens(
            request.dataset_id,
            request.base_model,
            timeout_seconds=seconds_for_nodes(context),
            store=self._on.store,
            nodes=self._on.nodes,
            blobs=self._on.blobs,
            clock=self._on.clock,
        )
        return messages.GetDatasetResponse(dataset=dataset_message(dataset, tokens))

    async def ListDatasets(self, request: messages.ListDatasetsRequest, context: Any) -> Any:
        """Lists datasets by id."""
        filters = {"name_contains": request.name_contains}
        position = self._on.pages.decode(request.page_token, listing="datasets", filters=filters)
        found = await datasets.list_datasets(
            store=self._on.store,
            after_id=int(position or 0),
            limit=page_limit(request.page_size),
            name_contains=request.name_contains,
        )
        page, following = cut_page(
            found,
            page_size=request.page_size,
            to_message=dataset_message,
            position=lambda dataset: str(dataset.dataset_id),
        )
        return messages.ListDatasetsResponse(
            datasets=page,
            next_page_token=self._on.pages.encode(following, listing="datasets", filters=filters),
        )

    async def PreviewDataset(self, request: messages.PreviewDatasetRequest, context: Any) -> Any:
        """Gives the first rows as they are stored, fewer when they are large; with a base model also rendered."""
        rows = await dataset_inspection.preview_dataset(
            request.dataset_id,
            num_rows=request.num_rows or DEFAULT_PREVIEW_ROWS,
            rendering=rendering_of(request),
            timeout_seconds=seconds_for_nodes(context),
            store=self._on.store,
            nodes=self._on.nodes,
            blobs=self._on.blobs,
            clock=self._on.clock,
        )
        page, _ = cut_page(rows, page_size=len(rows), to_message=row_message, position=lambda row: str(row.line))
        return messages.PreviewDatasetResponse(rows=page)

    async def DeleteDataset(self, request: messages.DeleteDatasetRequest, context: Any) -> Any:
        """Deletes a dataset that nothing uses."""
        await datasets.delete_dataset(
            request.dataset_id,
            store=self._on.store,
            blobs=self._on.blobs,
            clock=self._on.clock,
            request=request_key(request, method="DeleteDataset"),
        )
        return messages.DeleteDatasetResponse()

    async def _chunks(self, requests: AsyncIterator[messages.UploadDatasetRequest]) -> AsyncIterator[bytes]:
        while (request := await self._next(requests)) is not None:
            if request.WhichOneof("part") != "chunk":
                raise invalid_field("chunk", "must be set in every message after the first")
            yield request.chunk

    async def _next(
        self, requests: AsyncIterator[messages.UploadDatasetRequest]
    ) -> messages.UploadDatasetRequest | None:
        """The next message; None at the end. A client that falls silent is cut off, and its staged bytes with it."""
        idle_seconds = self._on.config.upload_idle_seconds
        limit = asyncio.timeout(idle_seconds)
        try:
            async with limit:
                return await anext(requests, None)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineTooShort("DEADLINE_TOO_SHORT", f"nothing arrived for {idle_seconds:g} s") from error
