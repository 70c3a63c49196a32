"""InferenceService of a node that has no model: it says what the test lets it say, and tells when its reader went."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from tunesmith.common.v1 import generation_pb2
from tunesmith.gpu.v1 import inference_service_pb2, inference_service_pb2_grpc


class FakeInference(inference_service_pb2_grpc.InferenceServiceServicer):
    """Mixed into a fake node. `words` are said one a message; `None` among them waits for ever."""

    def __init__(self) -> None:
        self.words: Sequence[str | None] = ("one ", "two ")
        # (code, reason) that a question is refused with, after so many words.
        self.inference_refusal: tuple[grpc.StatusCode, str] | None = None
        self.refuse_after = 0
        self.asked: list[inference_service_pb2.GenerateRequest] = []
        self.reader_gone = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.asked.append(request)
        part = generation_pb2.GeneratedPart
        try:
            for number, word in enumerate(self.words):
                if self.inference_refusal is not None and number == self.refuse_after:
                    await context.abort_with_status(_status(*self.inference_refusal))
                if word is None:
                    await asyncio.Event().wait()
                yield inference_service_pb2.GenerateResponse(part=part(text=word or "", num_tokens=1))
            statistics = generation_pb2.GenerationStatistics(num_prompt_tokens=5, num_tokens=len(self.words), warm=True)
            last = part(finish_reason=generation_pb2.FINISH_REASON_STOP, statistics=statistics)
            yield inference_service_pb2.GenerateResponse(part=last)
        except asyncio.CancelledError:
            self.reader_gone.set()
            raise


def _status(code: grpc.StatusCode, reason: str) -> grpc.Status:
    detail = AnyMessage()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="tunesmith"))
    return rpc_status.to_status(status_pb2.Status(code=code.value[0], message="refused", details=[detail]))
