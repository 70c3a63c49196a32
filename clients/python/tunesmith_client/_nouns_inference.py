"""Answers of what jobs trained, for a blocking client. Never repeats a stream: what was said cannot be taken back."""

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Unpack

import grpc

from tunesmith.common.v1 import generation_pb2
from tunesmith.control.v1 import inference_service_pb2, inference_service_pb2_grpc
from tunesmith_client._caller import Caller
from tunesmith_client._errors import error_from_sync
from tunesmith_client._generation import (
    Answer,
    AnswerBuilder,
    Messages,
    SamplingOptions,
    generate_request,
    ignore_text,
)


class Inference:
    """Asks jobs and bases."""

    def __init__(self, channel: grpc.Channel, caller: Caller) -> None:
        self._stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        self._caller = caller
        self._config = caller.config

    def generate(
        self,
        messages: Messages,
        *,
        job_id: str = "",
        base_model: str = "",
        base_only: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Generator[generation_pb2.GeneratedPart, None, None]:
        """Iterates the parts of an answer as they are made, the last with `finish_reason` and `statistics`.

        A job's latest adapter answers; with `base_only` its base, held in the same way; or a base model by name.
        Closing the iterator ends the generation. ResourceExhausted NODE_BUSY, also in the middle: runs go first.
        """
        request = generate_request(
            messages, job_id=job_id, base_model=base_model, base_only=base_only, sampling=sampling
        )
        return self._parts(request)

    def answer(
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
        with closing(self._responses(request)) as responses:
            for response in responses:
                builder.add(response)
                on_text(response.part.text)
        return builder.answer()

    def _parts(
        self, request: inference_service_pb2.GenerateRequest
    ) -> Generator[generation_pb2.GeneratedPart, None, None]:
        with closing(self._responses(request)) as responses:
            for response in responses:
                yield response.part

    def _responses(
        self, request: inference_service_pb2.GenerateRequest
    ) -> Generator[inference_service_pb2.GenerateResponse, None, None]:
        # Without a deadline of the caller's own an answer may take as long as it takes; keepalive notices a dead link.
        with self._caller.telling_of_close():
            call = self._stub.Generate(request, timeout=self._config.deadline_seconds)
        try:
            yield from call
        except grpc.RpcError as error:
            raise error_from_sync(error) from error
        finally:
            call.cancel()
