"""What every call of ours goes through: request id, deadline, validation, one mapping of errors, one line of log.

Handlers are wrapped once, before a server has them: a server's own interceptors are run again for every call. Health
and reflection pass untouched, but that watches of health are told when the server stops. No servicer aborts, logs its
call or checks a field's declaration by itself.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Final

import grpc
import structlog
from google.protobuf.message import Message

from control_service.api.errors import (
    REQUEST_ID_KEY,
    internal_error,
    status_code,
    status_message,
    trailing_metadata,
)
from control_service.api.limits import TimeLimits
from control_service.api.validation import check
from control_service.domain.errors import DeadlineTooShort, FieldViolation, InvalidArgument, TunesmithError, Unavailable
from control_service.domain.failpoints import failpoint

_OURS: Final = "/tunesmith."
_HEALTH_WATCH: Final = "/grpc.health.v1.Health/Watch"
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_log: Final = structlog.get_logger("control.api")

# Nothing is kept safe by them. What asks the system for random bytes lets go of the interpreter, once a call.
_request_ids: Final = random.Random()

_HOUR_SECONDS: Final = 3600.0
_READ_OUT_SECONDS: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class CallConfig:
    """How long calls may take. A caller's shorter deadline is kept; a stream has no limit while the caller reads it."""

    # A call with less time left than this is refused before it can write anything.
    min_remaining_seconds: float = 0.005
    max_seconds: float = 60.0
    # A reader that takes nothing of a stream for this long is cut off.
    stalled_reader_seconds: float = 60.0
    # How much of a refused stream is still read; see `_read_out`.
    read_out_bytes: int = 64 << 20
    # By the last part of the method's name.
    max_seconds_by_method: Mapping[str, float] = field(
        default_factory=lambda: {
            "PlanTraining": _HOUR_SECONDS,
            "UploadDataset": 12 * _HOUR_SECONDS,
            "RegisterDataset": 12 * _HOUR_SECONDS,
            # With a base model they push rows to a node and wait for it.
            "GetDataset": _HOUR_SECONDS,
            "PreviewDataset": _HOUR_SECONDS,
            "DeleteDataset": _HOUR_SECONDS,
            "DeleteJob": _HOUR_SECONDS,
            "DeleteArtifact": _HOUR_SECONDS,
        }
    )


class CallInterceptor:
    """Wraps handlers of ours, unary or streaming in either direction, and knows the calls that are open."""

    def __init__(self, *, config: CallConfig) -> None:
        self._config = config
        # Tasks of calls that are open.
        self._open: set[asyncio.Task[Any]] = set()
        # And those whose answer is still on its way out.
        self._unanswered: set[asyncio.Task[Any]] = set()
        # Watches of health, which end by nothing else than a cut.
        self._endless: set[asyncio.Task[Any]] = set()
        # Those of them all that were ended here, and why.
        self._ended: dict[asyncio.Task[Any], Callable[[], TunesmithError]] = {}
        self._limits = TimeLimits(self._end)
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    def drain(self) -> None:
        """Refuses new calls of ours with SHUTTING_DOWN; those that are open go on."""
        self._draining = True

    async def until_idle(self) -> None:
        """Waits until every call of ours has its answer. Health watches and reflection, which need not end, do
        not count."""
        await self._idle.wait()

    def cut(self) -> None:
        """Ends the calls that are open with SHUTTING_DOWN: a server that just stops would tell them CANCELLED, which
        is no word to call again."""
        for task in self._endless:
            self._expect_answer(task)
        for task in self._open | self._endless:
            self._end(task, _shutting_down)

    def wrap(self, method: str, handler: Any) -> Any:
        """The handler with the boundary around it. `method`: the full name, `/package.Service/Method`."""
        if method == _HEALTH_WATCH:
            return grpc.unary_stream_rpc_method_handler(
                self._endless_stream(handler.unary_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        if not method.startswith(_OURS):
            return handler
        for kind, (wrap, make) in _KINDS.items():
            behavior = getattr(handler, kind)
            if behavior is not None:
                return make(
                    wrap(self, behavior, method),
                    request_deserializer=handler.request_deserializer,
                    response_serializer=handler.response_serializer,
                )
        raise NotImplementedError(f"{method} streams in both directions, which no method of the contract does")

    def unary_unary(self, behavior: Any, method: str) -> Any:
        """One request, one answer."""
        seconds = self._max_seconds(method)

        async def serve(request: Message, context: Any) -> Any:
            async with _Boundary(self, method, context, seconds):
                _accept(request)
                answer = await behavior(request, context)
                # The job that the call made is on its line of log, so that its request can be found by it.
                if "job" in answer.DESCRIPTOR.fields_by_name:
                    _bind_job_id(answer.job)
                failpoint("reply.before-send")
                return answer

        return serve

    def unary_stream(self, behavior: Any, method: str) -> Any:
        """One request, a stream of answers."""

        seconds = self._config.stalled_reader_seconds
        why = partial(_stalled, seconds)

        async def serve(request: Message, context: Any) -> None:
            async with _Boundary(self, method, context, math.inf) as task:
                _accept(request)
                # A reader that goes away cancels this; the behavior's generator must end with it.
                async with aclosing(behavior(request, context)) as messages:
                    async for message in messages:
                        # Not by yielding: what waits at a yield can neither be timed nor told why it ends.
                        self._limits.set(task, seconds, why)
                        await context.write(message)
                        self._limits.clear(task)

        return serve

    def stream_unary(self, behavior: Any, method: str) -> Any:
        """A stream of requests, one answer."""
        seconds = self._max_seconds(method)

        async def serve(requests: AsyncIterator[Message], context: Any) -> Any:
            async def accepted() -> AsyncIterator[Message]:
                async for request in requests:
                    _accept(request)
                    yield request

            async with _Boundary(self, method, context, seconds):
                try:
                    return await behavior(accepted(), context)
                except TunesmithError:
                    await _read_out(requests, limit_bytes=self._config.read_out_bytes)
                    raise

        return serve

    def _endless_stream(self, behavior: Any) -> Any:
        """A watch of health that is told SHUTTING_DOWN when it is cut."""

        async def serve(request: Any, context: Any) -> None:
            task = asyncio.current_task()
            assert task is not None, "a call is served in a task"
            self._endless.add(task)
            try:
                await behavior(request, context)
            except asyncio.CancelledError:
                if task not in self._ended:
                    raise
                task.uncancel()
            finally:
                self._endless.discard(task)
                self._ended.pop(task, None)
            # What a watch of health ends with, if it ends.
            refusal = _shutting_down()
            await context.abort(status_code(refusal), status_message(refusal))

        return serve

    def _expect_answer(self, task: asyncio.Task[Any]) -> None:
        # grpc writes the answer in the same task, after the behavior has ended.
        self._unanswered.add(task)
        self._idle.clear()
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[Any]) -> None:
        self._unanswered.discard(task)
        if not self._unanswered:
            self._idle.set()

    def _max_seconds(self, method: str) -> float:
        return self._config.max_seconds_by_method.get(method.rsplit("/", 1)[-1], self._config.max_seconds)

    # Of a call's boundary.

    def begin(self, task: asyncio.Task[Any], context: Any, max_seconds: float) -> None:
        """A call is open. Unavailable SHUTTING_DOWN, DeadlineTooShort."""
        self._open.add(task)
        self._expect_answer(task)
        if self._draining:
            raise _shutting_down()
        remaining = context.time_remaining()
        if remaining is not None and remaining < self._config.min_remaining_seconds:
            raise DeadlineTooShort("DEADLINE_TOO_SHORT", f"only {max(0.0, remaining):.3f} s are left for the call")
        if max_seconds < math.inf:
            self._limits.set(task, max_seconds, partial(_too_long, max_seconds))

    def finish(self, task: asyncio.Task[Any]) -> TunesmithError | None:
        """A call is over; why, if it was ended from here."""
        self._open.discard(task)
        self._limits.clear(task)
        why = self._ended.pop(task, None)
        return None if why is None else why()

    def _end(self, task: asyncio.Task[Any], why: Callable[[], TunesmithError]) -> None:
        if task not in self._ended:
            self._ended[task] = why
            task.cancel()


class _Boundary:
    """Around one call: turns what is raised inside into the call's status."""

    __slots__ = ("_calls", "_context", "_max_seconds", "_method", "_request_id", "_start", "_task")

    def __init__(self, calls: CallInterceptor, method: str, context: Any, max_seconds: float) -> None:
        self._calls = calls
        self._method = method
        self._context = context
        self._max_seconds = max_seconds

    async def __aenter__(self) -> asyncio.Task[Any]:
        context = self._context
        self._request_id = _request_id(context)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=self._request_id, method=self._method)
        context.set_trailing_metadata(((REQUEST_ID_KEY, self._request_id),))
        self._start = time.monotonic()
        task = asyncio.current_task()
        assert task is not None, "a call is served in a task"
        self._task = task
        try:
            self._calls.begin(task, context, self._max_seconds)
        except TunesmithError as error:
            await self._refuse(error)
        return task

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._calls.finish(self._task)
            self._tell(grpc.StatusCode.OK, None)
        elif isinstance(error, TunesmithError):
            await self._refuse(error)
        elif isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            ended = self._calls.finish(self._task)
            if ended is None:
                self._tell(grpc.StatusCode.CANCELLED, None)
                return
            self._task.uncancel()
            await self._refuse(ended)
        elif isinstance(error, Exception):
            # The outermost boundary of a call: a defect must not leak to the caller.
            _log.error("call failed by a defect", exc_info=error)
            await self._refuse(internal_error(self._request_id))
        else:
            self._calls.finish(self._task)

    async def _refuse(self, refusal: TunesmithError) -> None:
        self._calls.finish(self._task)
        code = status_code(refusal)
        self._tell(code, refusal)
        metadata = trailing_metadata(refusal, request_id=self._request_id)
        await self._context.abort(code, status_message(refusal), trailing_metadata=metadata)

    def _tell(self, code: grpc.StatusCode, refusal: TunesmithError | None) -> None:
        _log.info(
            "call",
            code=code.name,
            seconds=round(time.monotonic() - self._start, 6),
            reason=refusal.reason if refusal else None,
            message=refusal.message if refusal else None,
        )


_KINDS: Final[Mapping[str, tuple[Callable[[CallInterceptor, Any, str], Any], Callable[..., Any]]]] = {
    "unary_unary": (CallInterceptor.unary_unary, grpc.unary_unary_rpc_method_handler),
    "unary_stream": (CallInterceptor.unary_stream, grpc.unary_stream_rpc_method_handler),
    "stream_unary": (CallInterceptor.stream_unary, grpc.stream_unary_rpc_method_handler),
}


def _too_long(seconds: float) -> DeadlineTooShort:
    return DeadlineTooShort("DEADLINE_TOO_SHORT", f"the call took longer than {seconds:g} s")


def _stalled(seconds: float) -> Unavailable:
    return Unavailable(
        "READER_STALLED", f"nothing was taken for {seconds:g} s; go on from the last message", retry_after_seconds=1.0
    )


def _shutting_down() -> Unavailable:
    return Unavailable("SHUTTING_DOWN", "the service is stopping", retry_after_seconds=1.0)


def _request_id(context: Any) -> str:
    """The caller's request id if it gave a usable one, else a new one. For logs and answers; it makes nothing once."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return f"{_request_ids.getrandbits(64):016x}"


def _accept(request: Message) -> None:
    violations = check(request)
    if violations:
        first, more = violations[0], len(violations) - 1
        raise InvalidArgument(
            "INVALID_FIELD",
            f"{first.field}: {first.description}" + (f" (and {more} more)" if more else ""),
            violations=tuple(FieldViolation(violation.field, violation.description) for violation in violations),
        )
    _bind_job_id(request)


def _bind_job_id(message: Any) -> None:
    # To ask a message for what it has not is slow.
    if "job_id" in message.DESCRIPTOR.fields_by_name and (job_id := message.job_id):
        structlog.contextvars.bind_contextvars(job_id=job_id)


async def _read_out(requests: AsyncIterator[Message], *, limit_bytes: int) -> None:
    """Reads and forgets what a refused client is still sending, within a limit of bytes and a second.

    An asyncio client whose write fails because the call has just ended loses the call's status and reports INTERNAL
    instead (grpc/grpc#36066); one that could send all it had reads the refusal.
    """
    num_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_READ_OUT_SECONDS):
            async for request in requests:
                num_bytes += request.ByteSize()
                if num_bytes > limit_bytes:
                    return
