"""Base models and model families on the wire."""

from __future__ import annotations

from control_service.app.models import ModelTypeView, ModelView
from tunesmith.control.v1 import model_service_pb2


def model_message(view: ModelView) -> model_service_pb2.Model:
    """A base model and the nodes that have it."""
    model = view.model
    return model_service_pb2.Model(
        name=model.name,
        config_type=model.config_type,
        weights_digest=model.weights_digest,
        size_bytes=model.size_bytes,
        num_parameters=model.num_parameters,
        vocabulary_size=model.vocabulary_size,
        has_chat_template=model.has_chat_template,
        nodes=view.nodes,
        problem=model.problem,
    )


def model_type_message(view: ModelTypeView) -> model_service_pb2.ModelType:
    """A model family and the nodes whose catalogs have it."""
    return model_service_pb2.ModelType(
        model_type=view.entry.id,
        config_types=view.config_types,
        description=view.entry.description,
        nodes=view.nodes,
    )
