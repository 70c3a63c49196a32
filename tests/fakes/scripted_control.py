"""A control service made of functions, on a real port: what a client is told is exactly what the test says.

`handlers["GetJob"] = lambda request, context: ...`; a method without a handler is UNIMPLEMENTED. `refuse` ends a call
with rich details as the real service does.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NoReturn, Self

import grpc
from google.protobuf import any_pb2, descriptor, duration_pb2
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from tunesmith.control.v1 import (
    artifact_service_pb2,
    dataset_service_pb2,
    inference_service_pb2,
    job_service_pb2,
    model_service_pb2,
    node_service_pb2,
    project_service_pb2,
)

Handler = Callable[[Any, grpc.ServicerContext], Any]

SERVICES: list[descriptor.ServiceDescriptor] = [
    service
    for file in (
        artifact_service_pb2,
        dataset_service_pb2,
        inference_service_pb2,
        job_service_pb2,
        model_service_pb2,
        node_service_pb2,
        project_service_pb2,
    )
    for service in file.DESCRIPTOR.services_by_name.values()
]


def refuse(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    reason: str,
    message: str = "no",
    *,
    metadata: dict[str, str] | None = None,
    violations: dict[str, str] | None = None,
    retry_after_seconds: int | None = None,
    request_id: str = "",
) -> NoReturn:
    """Ends the call with `google.rpc.Status` details."""
    details = [error_details_pb2.ErrorInfo(reason=reason, domain="tunesmith", metadata=metadata or {})]
    if violations:
        fields = [
            error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
            for field, text in violations.items()
        ]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if retry_after_seconds is not None:
        delay = duration_pb2.Duration(seconds=retry_after_seconds)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort_with_status does not return")


class FakeControl:
    """Serves `handlers`; `requests` has every request by method name, in the order of arrival."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}
        self.requests: dict[str, list[Any]] = {}
        self._lock = threading.Lock()
        # A watch holds a thread for as long as it lives: more threads than any test opens streams.
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        for service in SERVICES:
            methods = {method.name: self._method_handler(method) for method in service.methods}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, methods),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait(10)

    def calls(self, method: str) -> list[Any]:
        """The requests that came for a method."""
        with self._lock:
            return list(self.requests.get(method, []))

    def _answer(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            self.requests.setdefault(method, []).append(request)
        handler = self.handlers.get(method)
        if handler is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"the test gave no handler for {method}")
        return handler(request, context)

    def _method_handler(self, method: descriptor.MethodDescriptor) -> Any:
        request_class = GetMessageClass(method.input_type)
        response_class = GetMessageClass(method.output_type)

        def unary(request: Any, context: grpc.ServicerContext) -> Any:
            return self._answer(method.name, request, context)

        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield from self._answer(method.name, request, context)

        build = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[(method.client_streaming, method.server_streaming)]
        return build(
            stream if method.server_streaming else unary,
            request_deserializer=request_class.FromString,
            response_serializer=response_class.SerializeToString,
        )
