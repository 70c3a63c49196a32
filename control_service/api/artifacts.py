"""Serves `ArtifactService`: wire in, use case, wire out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from control_service.api.deadline import seconds_for_nodes
from control_service.api.dependencies import Dependencies
from control_service.api.requests import request_key
from control_service.api.wire.artifacts import artifact_message
from control_service.api.wire.jobs import job_message
from control_service.app import artifacts, exports
from tunesmith.control.v1 import artifact_service_pb2 as messages
from tunesmith.control.v1 import artifact_service_pb2_grpc


class ArtifactServicer(artifact_service_pb2_grpc.ArtifactServiceServicer):
    """What jobs left, towards clients."""

    def __init__(self, dependencies: Dependencies) -> None:
        self._on = dependencies

    async def ListArtifacts(self, request: messages.ListArtifactsRequest, context: Any) -> Any:
        """Lists a job's collected artifacts."""
        found = await artifacts.list_artifacts(request.job_id, store=self._on.store)
        return messages.ListArtifactsResponse(artifacts=[artifact_message(artifact) for artifact in found])

    async def DownloadArtifact(
        self, request: messages.DownloadArtifactRequest, context: Any
    ) -> AsyncIterator[messages.DownloadArtifactResponse]:
        """Streams one file of an artifact from an offset."""
        chunks = await artifacts.open_artifact_file(
            request.job_id,
            request.name,
            request.path,
            offset=request.offset,
            store=self._on.store,
            blobs=self._on.blobs,
        )
        async for chunk in chunks:
            yield messages.DownloadArtifactResponse(chunk=chunk)

    async def ExportArtifact(self, request: messages.ExportArtifactRequest, context: Any) -> Any:
        """Queues a job that writes what a finished job trained in another form."""
        view = await exports.export_artifact(
            request.job_id,
            request.format,
            max_logit_difference=request.max_logit_difference if request.HasField("max_logit_difference") else None,
            timeout_seconds=seconds_for_nodes(context),
            store=self._on.store,
            nodes=self._on.nodes,
            queue=self._on.queue,
            clock=self._on.clock,
            ids=self._on.ids,
            codec=self._on.codec,
            request=request_key(request, method="ExportArtifact"),
        )
        return messages.ExportArtifactResponse(job=job_message(view))

    async def DeleteArtifact(self, request: messages.DeleteArtifactRequest, context: Any) -> Any:
        """Deletes an artifact's bytes and record."""
        await artifacts.delete_artifact(
            request.job_id,
            request.name,
            store=self._on.store,
            blobs=self._on.blobs,
            clock=self._on.clock,
            request=request_key(request, method="DeleteArtifact"),
        )
        return messages.DeleteArtifactResponse()
