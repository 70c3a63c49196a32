"""Answers of what jobs trained, for asyncio. Never repeats a stream: what was said cannot be taken back."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Unpack

import grpc

from tunesmith.common.v1 import generation_pb2
from tunesmith.control.v1 import inference_service_pb2, inference_service_pb2_grpc
from tunesmith_client._caller_aio import AsyncCaller
from tunesmith_client._errors import error_from_aio
from tunesmith_client._generation import (
    Answer,
    AnswerBuilder,
    Messages,
    SamplingOptions,
    generate_request,
    ignore_text,
)


class AsyncInference:
    """Asks jobs and bases."""

    def __init__(self, channel: grpc.aio.Channel, caller: AsyncCaller) -> None:
        self._stub: inference_service_pb2_grpc.InferenceServiceAsyncStub = (
            inference_service_pb2_grpc.InferenceServiceStub(channel)
        )
        self._caller = caller
        self._config = caller.config

    async def generate(
        self,
        messages: Messages,
        *,
        job_id: str = "",
        base_model: str = "",
        base_only: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncGenerator[generation_pb2.GeneratedPart, None]:
        """Iterates the parts of an answer as they are made, the last with `finish_reason` and `statistics`.

        A job's latest adapter answers; with `base_only` its base, held in the same way; or a base model by name.
        Closing the iterator, or cancelling the task that iterates, ends the generation. ResourceExhausted NODE_BUSY,
        also in the middle: runs go first.
        """
        request = generate_request(
            messages, job_id=job_id, base_model=base_model, base_only=base_only, sampling=sampling
        )
        async with aclosing(self._responses(request)) as responses:
            async for response in responses:
                yield response.part

    async def answer(
        self,
        messages: Messages,
        *,
        job_id: str = "",
        base_model: str = "",
        base_only: bool = False,
        on_text: Callable[[str], object] = ignore_text,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """The same in one piece, once it is whole; `on_text` is given the text as it comes."""
        builder = AnswerBuilder()
        request = generate_request(
            messages, job_id=job_id, base_model=base_model, base_only=base_only, sampling=sampling
        )
        async with aclosing(self._responses(request)) as responses:
            async for response in responses:
                builder.add(response)
                on_text(response.part.text)
        return builder.answer()

    async def _responses(
        self, request: inference_service_pb2.GenerateRequest
    ) -> AsyncGenerator[inference_service_pb2.GenerateResponse, None]:
        # Without a deadline of the caller's own an answer may take as long as it takes; keepalive notices a dead link.
        async with self._caller.telling_of_close():
            call = self._stub.Generate(request, timeout=self._config.deadline_seconds)
        responses = aiter(call)
        try:
            while True:
                async with self._caller.telling_of_close():
                    response = await anext(responses, None)
                if response is None:
                    return
                yield response
        except grpc.aio.AioRpcError as error:
            raise error_from_aio(error) from error
        finally:
            call.cancel()
