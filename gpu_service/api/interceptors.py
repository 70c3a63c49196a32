"""What every call goes through: a request id on every log line, a line for its end, and errors by the one table.

A reader that takes nothing of a stream for too long is cut off. Refuses to swallow anything: a defect is logged with
its trace and told as INTERNAL.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

import grpc
import structlog
from grpc import aio

from gpu_service.api.errors import internal_status, status_of
from gpu_service.domain.errors import Fault, Refusal

_log = structlog.get_logger(__name__)
_REQUEST_ID_KEY = "x-request-id"
_MAX_REQUEST_ID_LENGTH = 64
_READ_OUT_SECONDS = 1.0
_READ_OUT_BYTES = 64 << 20
# Probes and reflection would drown the rest.
_QUIET_SERVICES = ("/grpc.health.", "/grpc.reflection.")


class CallInterceptor(aio.ServerInterceptor):
    """Wraps every handler of ours."""

    def __init__(self, *, stalled_reader_seconds: float = 60.0) -> None:
        """`stalled_reader_seconds`: how long a stream's reader may take nothing."""
        self._stalled_reader_seconds = stalled_reader_seconds

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith(_QUIET_SERVICES):
            return handler
        return _wrap(handler, method, _request_id(handler_call_details), self._stalled_reader_seconds)


def _request_id(details: grpc.HandlerCallDetails) -> str:
    for key, value in details.invocation_metadata or ():
        if key == _REQUEST_ID_KEY and isinstance(value, str) and len(value) <= _MAX_REQUEST_ID_LENGTH:
            return value
    return uuid.uuid4().hex


def _wrap(handler: Any, method: str, request_id: str, stalled_reader_seconds: float) -> grpc.RpcMethodHandler[Any, Any]:
    async def unary(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
        call = handler.stream_unary if handler.request_streaming else handler.unary_unary
        with _Call(method, request_id, request) as log:
            try:
                return await call(request, context)
            except Refusal as refusal:
                log.refused(refusal)
                if handler.request_streaming:
                    await _read_out(request)
                await context.abort_with_status(status_of(refusal, method=method.rpartition("/")[2]))
            except Exception as defect:  # noqa: BLE001 - the outermost boundary of a call; logged with its trace
                log.failed(defect)
                await context.abort_with_status(internal_status(request_id))

    async def stream(request: Any, context: aio.ServicerContext[Any, Any]) -> None:
        with _Call(method, request_id, request) as log:
            try:
                # Closed at once when the caller goes away, not when it is garbage.
                async with aclosing(handler.unary_stream(request, context)) as responses:
                    async for response in responses:
                        # Not by yielding: what waits at a yield can neither be timed nor told why it ends.
                        await _write(context, response, stalled_reader_seconds)
            except Refusal as refusal:
                log.refused(refusal)
                await context.abort_with_status(status_of(refusal, method=method.rpartition("/")[2]))
            except Exception as defect:  # noqa: BLE001 - the outermost boundary of a call; logged with its trace
                log.failed(defect)
                await context.abort_with_status(internal_status(request_id))

    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(
            stream, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )
    make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
    return make(
        unary, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
    )


async def _write(context: aio.ServicerContext[Any, Any], response: Any, seconds: float) -> None:
    """Give the reader a message. Raises `Refusal` READER_STALLED when it takes none for too long."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            await context.write(response)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise Refusal(
            "READER_STALLED", Fault.USER, f"nothing was taken for {seconds:g} s; go on from the last message"
        ) from error


async def _read_out(requests: AsyncIterator[Any]) -> None:
    """Reads and forgets what a refused client is still sending, within a limit of bytes and a second.

    An asyncio client whose write fails because the call has just ended loses the call's status and reports INTERNAL
    instead (grpc/grpc#36066); one that could send all it had reads the refusal.
    """
    num_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_READ_OUT_SECONDS):
            async for request in requests:
                num_bytes += request.ByteSize()
                if num_bytes > _READ_OUT_BYTES:
                    return


class _Call:
    """One call's log lines and its request id."""

    def __init__(self, method: str, request_id: str, request: Any) -> None:
        self._method = method.removeprefix("/")
        self._ids: dict[str, Any] = {"request_id": request_id}
        # Requests about a run say which in `key`; streams of requests say nothing here.
        key = getattr(request, "key", None)
        if key is not None:
            self._ids |= {"job_id": key.job_id, "attempt": key.attempt}
        self._outcome = "OK"

    def __enter__(self) -> _Call:
        self._started = time.monotonic()
        structlog.contextvars.bind_contextvars(**self._ids)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        outcome = "CANCELLED" if kind is not None and self._outcome == "OK" else self._outcome
        seconds = round(time.monotonic() - self._started, 4)
        _log.info("call", method=self._method, outcome=outcome, seconds=seconds)
        structlog.contextvars.unbind_contextvars(*self._ids)

    def refused(self, refusal: Refusal) -> None:
        self._outcome = refusal.reason

    def failed(self, defect: Exception) -> None:
        self._outcome = "INTERNAL"
        _log.error("defect", method=self._method, exc_info=defect)
