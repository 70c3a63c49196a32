"""Serves `InferenceService`: wire in, use case, wire out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from google.protobuf import json_format

from control_service.api.dependencies import Dependencies
from control_service.app import inference
from control_service.domain.errors import invalid_field
from control_service.domain.generation import ChatMessage, GeneratedPart, GenerationSource
from control_service.wire.training_spec import proto_json
from control_service.wire.values import enum_number
from tunesmith.common.v1 import generation_pb2
from tunesmith.control.v1 import inference_service_pb2 as messages
from tunesmith.control.v1 import inference_service_pb2_grpc


class InferenceServicer(inference_service_pb2_grpc.InferenceServiceServicer):
    """Answers of what jobs trained, towards clients."""

    def __init__(self, dependencies: Dependencies) -> None:
        self._on = dependencies

    async def Generate(self, request: messages.GenerateRequest, context: Any) -> AsyncIterator[Any]:
        """Streams an answer; the first message says who gives it."""
        answer = inference.generate(
            _source(request),
            [ChatMessage(role=message.role, content=message.content) for message in request.messages],
            proto_json(request.sampling),
            store=self._on.store,
            nodes=self._on.nodes,
            blobs=self._on.blobs,
        )
        is_first = True
        async with aclosing(answer) as parts:
            async for answering, part in parts:
                response = messages.GenerateResponse(part=_part_message(part))
                if is_first:
                    response.node, response.adapter = answering.node, answering.adapter
                yield response
                is_first = False


def _source(request: messages.GenerateRequest) -> GenerationSource:
    if not (request.job_id or request.base_model):
        raise invalid_field("source", "name a job or a base model")
    if request.messages[-1].role == "assistant":
        raise invalid_field("messages", "the last message is the assistant's own")
    return GenerationSource(job_id=request.job_id, base_model=request.base_model, base_only=request.base_only)


def _part_message(part: GeneratedPart) -> generation_pb2.GeneratedPart:
    message = generation_pb2.GeneratedPart(text=part.text, num_tokens=part.num_tokens)
    if part.finish_reason:
        message.finish_reason = enum_number(generation_pb2.FinishReason, part.finish_reason)
        json_format.ParseDict(dict(part.statistics or {}), message.statistics)
    return message
