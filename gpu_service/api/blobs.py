"""BlobService: streams bytes in and out by content. Decides nothing about where they lie."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from io import FileIO
from typing import Any

from grpc import aio

from gpu_service.domain.errors import refuse_user
from gpu_service.runs.blobs import MAX_CHUNK_BYTES, BlobStore
from gpu_service.runs.manager import RunManager
from gpu_service.runs.run_files import blob_not_found
from gpu_service.runs.threads import finish_in_thread
from tunesmith.gpu.v1 import blob_service_pb2, blob_service_pb2_grpc

Context = aio.ServicerContext[Any, Any]


class BlobServicer(blob_service_pb2_grpc.BlobServiceServicer):
    """Every method raises `Refusal`; the interceptor tells it."""

    def __init__(self, *, blobs: BlobStore, manager: RunManager) -> None:
        self._blobs = blobs
        self._manager = manager

    async def FindMissingBlobs(  # noqa: N802 - the contract's name
        self, request: blob_service_pb2.FindMissingBlobsRequest, context: Context
    ) -> blob_service_pb2.FindMissingBlobsResponse:
        missing = await self._blobs.find_missing(request.sha256)
        return blob_service_pb2.FindMissingBlobsResponse(
            missing=[
                blob_service_pb2.MissingBlob(sha256=sha256, stored_bytes=stored_bytes)
                for sha256, stored_bytes in missing
            ]
        )

    async def WriteBlob(  # noqa: N802
        self, request_iterator: AsyncIterator[blob_service_pb2.WriteBlobRequest], context: Context
    ) -> blob_service_pb2.WriteBlobResponse:
        first = await anext(aiter(request_iterator), None)
        if first is None:
            raise refuse_user("INVALID_FIELD", "the stream is empty", field="sha256")
        if first.size_bytes < 0 or not 0 <= first.offset <= first.size_bytes:
            raise refuse_user("INVALID_FIELD", "offset must lie between 0 and size_bytes", field="offset")

        async def chunks() -> AsyncIterator[bytes]:
            yield first.chunk
            async for request in request_iterator:
                yield request.chunk

        stored_bytes = await self._blobs.write(
            sha256=first.sha256, size_bytes=first.size_bytes, offset=first.offset, chunks=chunks()
        )
        return blob_service_pb2.WriteBlobResponse(stored_bytes=stored_bytes)

    async def ReadBlob(  # noqa: N802
        self, request: blob_service_pb2.ReadBlobRequest, context: Context
    ) -> AsyncIterator[blob_service_pb2.ReadBlobResponse]:
        if request.offset < 0:
            raise refuse_user("INVALID_FIELD", "offset counts from 0", field="offset")
        path = await self._manager.find_file(request.sha256)
        if path is None:
            raise blob_not_found([request.sha256])
        try:
            # A file object, because it is closed even when the caller goes away while it is being opened.
            stream = await asyncio.to_thread(FileIO, path)
        except FileNotFoundError:
            # Deleted to make room, or with its run, since it was found.
            raise blob_not_found([request.sha256]) from None
        with stream:
            offset = request.offset
            while chunk := await finish_in_thread(os.pread, stream.fileno(), MAX_CHUNK_BYTES, offset):
                offset += len(chunk)
                yield blob_service_pb2.ReadBlobResponse(chunk=chunk)
