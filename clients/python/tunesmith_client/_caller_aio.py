"""One asyncio call: deadline, request id, repeats on UNAVAILABLE, typed errors. Knows no noun."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import Message

from tunesmith_client._config import DEFAULT_DEADLINE_SECONDS, ClientConfig
from tunesmith_client._errors import client_closed, error_from_aio
from tunesmith_client._retry import Repeats, give_request_id, lost_if_cancelled, method_of

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Result = TypeVar("Result")

if TYPE_CHECKING:
    AsyncUnaryMethod = grpc.aio.UnaryUnaryMultiCallable[Request, Response]


class AsyncCaller:
    """Calls unary methods of one channel."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self._random = random.Random()
        self.is_closed = False

    async def call(
        self,
        method: "AsyncUnaryMethod[Request, Response]",
        request: Request,
        *,
        default_seconds: float = DEFAULT_DEADLINE_SECONDS,
    ) -> Response:
        """The response, or a TunesmithError. Repeats with the same request id while the deadline allows, which is
        at least `default_seconds`."""
        give_request_id(request)
        ends_at = time.monotonic() + self.config.deadline_of(method_of(request), default_seconds=default_seconds)
        return await self.repeat(
            lambda: method(request, timeout=max(0.001, ends_at - time.monotonic())), ends_at=ends_at
        )

    @asynccontextmanager
    async def telling_of_close(self) -> AsyncIterator[None]:
        """Around one wait: CallCancelled instead of what a channel says that is being closed, or is closed."""
        num_before = await count_cancellations()
        try:
            yield
        except (asyncio.CancelledError, grpc.aio.UsageError) as error:
            # A task that was cancelled hears of that, whatever else goes on.
            if self.is_closed and not is_cancelled(num_before):
                raise client_closed() from error
            raise

    async def repeat(self, attempt: Callable[[], Awaitable[Result]], *, ends_at: float) -> Result:
        """Runs `attempt` until it returns, or the policy ends it; `ends_at` is on the monotonic clock.

        When the client is closed: CallCancelled, or what the last attempt before that met.
        """
        repeats = Repeats(self.config.retry, self._random)
        while True:
            try:
                async with self.telling_of_close():
                    return await attempt()
            except grpc.aio.AioRpcError as error:
                typed = lost_if_cancelled(error_from_aio(error))
                pause_seconds = repeats.pause(typed, remaining_seconds=ends_at - time.monotonic())
                if pause_seconds is None:
                    raise typed from error
                await asyncio.sleep(pause_seconds)
                if self.is_closed:
                    raise typed from error


async def count_cancellations() -> int:
    """How often the task that asks was cancelled, and went on: what `is_cancelled` is told after the wait that follows.

    Raises the cancellation that is on its way to the task.
    """
    num_before = _num_cancellations()
    if num_before:
        # Whatever was not delivered yet is delivered here.
        await asyncio.sleep(0)
    return num_before


def is_cancelled(num_before: int) -> bool:
    """Whether somebody cancelled the task that asks, after it was cancelled as often as this."""
    return _num_cancellations() > num_before


def _num_cancellations() -> int:
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()
