"""Serves `ModelService`: wire in, use case, wire out."""

from __future__ import annotations

from typing import Any

from control_service.api.dependencies import Dependencies
from control_service.api.paging import cut_page, page_limit
from control_service.api.wire.models import model_message, model_type_message
from control_service.app import models
from tunesmith.control.v1 import model_service_pb2 as messages
from tunesmith.control.v1 import model_service_pb2_grpc


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """Base models and families, towards clients."""

    def __init__(self, dependencies: Dependencies) -> None:
        self._on = dependencies

    async def ListModels(self, request: messages.ListModelsRequest, context: Any) -> Any:
        """Lists the models of all nodes by name."""
        after_name = self._on.pages.decode(request.page_token, listing="models", filters={})
        found = models.list_models(nodes=self._on.nodes, after_name=after_name, limit=page_limit(request.page_size))
        page, following = cut_page(
            found, page_size=request.page_size, to_message=model_message, position=lambda view: view.model.name
        )
        return messages.ListModelsResponse(
            models=page,
            next_page_token=self._on.pages.encode(following, listing="models", filters={}),
        )

    async def GetModel(self, request: messages.GetModelRequest, context: Any) -> Any:
        """Reads one model."""
        return messages.GetModelResponse(model=model_message(models.get_model(request.name, nodes=self._on.nodes)))

    async def ListModelTypes(self, request: messages.ListModelTypesRequest, context: Any) -> Any:
        """Lists the model families of the nodes' catalogs."""
        views = models.list_model_types(nodes=self._on.nodes)
        return messages.ListModelTypesResponse(model_types=[model_type_message(view) for view in views])
