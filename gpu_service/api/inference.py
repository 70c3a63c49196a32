"""InferenceService: unpacks, asks the desk, packs. Decides nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from google.protobuf import json_format
from grpc import aio

from gpu_service.domain.generation import DEFAULT_MAX_NEW_TOKENS, AdapterFile, GenerationRequest, Message, Sampling
from gpu_service.domain.spec import Lora, Quantization, decode_message
from gpu_service.runs.inference import InferenceDesk
from gpu_service.runs.inference_stream import GeneratedPart
from tunesmith.common.v1 import generation_pb2
from tunesmith.gpu.v1 import inference_service_pb2, inference_service_pb2_grpc

Context = aio.ServicerContext[Any, Any]


class InferenceServicer(inference_service_pb2_grpc.InferenceServiceServicer):
    """Raises `Refusal`; the interceptor tells it."""

    def __init__(self, *, desk: InferenceDesk) -> None:
        self._desk = desk

    async def Generate(  # noqa: N802 - the contract's name
        self, request: inference_service_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_service_pb2.GenerateResponse]:
        async with aclosing(self._desk.generate(_request_from_wire(request))) as parts:
            async for part in parts:
                yield inference_service_pb2.GenerateResponse(part=_part_to_wire(part))


def _request_from_wire(request: inference_service_pb2.GenerateRequest) -> GenerationRequest:
    quantization = json_format.MessageToDict(request.quantization, preserving_proto_field_name=True)
    lora = json_format.MessageToDict(request.lora, preserving_proto_field_name=True)
    return GenerationRequest(
        base_model=request.base_model,
        weights_digest=request.weights_digest,
        model_type=request.model_type,
        training_type=request.training_type,
        quantization=decode_message(Quantization, quantization, "quantization"),
        adapter_files=tuple(AdapterFile(path=file.path, sha256=file.sha256) for file in request.adapter_files),
        lora=decode_message(Lora, lora, "lora"),
        chat_template=request.chat_template,
        messages=tuple(Message(role=message.role, content=message.content) for message in request.messages),
        sampling=_sampling_from_wire(request.sampling),
    )


def _sampling_from_wire(sampling: generation_pb2.Sampling) -> Sampling:
    return Sampling(
        max_new_tokens=sampling.max_new_tokens if sampling.HasField("max_new_tokens") else DEFAULT_MAX_NEW_TOKENS,
        temperature=sampling.temperature,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop=tuple(sampling.stop),
    )


def _part_to_wire(part: GeneratedPart) -> generation_pb2.GeneratedPart:
    message = generation_pb2.GeneratedPart(text=part.text, num_tokens=part.num_tokens)
    if part.finish_reason:
        message.finish_reason = generation_pb2.FinishReason.Value(f"FINISH_REASON_{part.finish_reason}")
        message.statistics.MergeFrom(generation_pb2.GenerationStatistics(**(part.statistics or {})))
    return message
