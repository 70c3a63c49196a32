"""One blocking call: deadline, request id, repeats on UNAVAILABLE, typed errors. Knows no noun."""

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import Message

from tunesmith_client._config import DEFAULT_DEADLINE_SECONDS, ClientConfig
from tunesmith_client._errors import TunesmithError, error_from_sync
from tunesmith_client._retry import give_request_id, method_of, pause_after, pauses

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Result = TypeVar("Result")

if TYPE_CHECKING:
    UnaryMethod = grpc.UnaryUnaryMultiCallable[Request, Response]


class Caller:
    """Calls unary methods of one channel."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self._random = random.Random()

    def call(
        self,
        method: "UnaryMethod[Request, Response]",
        request: Request,
        *,
        default_seconds: float = DEFAULT_DEADLINE_SECONDS,
    ) -> Response:
        """The response, or a TunesmithError. Repeats with the same request id while the deadline allows, which is
        at least `default_seconds`."""
        give_request_id(request)
        ends_at = time.monotonic() + self.config.deadline_of(method_of(request), default_seconds=default_seconds)
        return self.repeat(lambda: method(request, timeout=max(0.001, ends_at - time.monotonic())), ends_at=ends_at)

    def repeat(self, attempt: Callable[[], Result], *, ends_at: float) -> Result:
        """Runs `attempt` until it returns, up to the policy's attempts; `ends_at` is on the monotonic clock."""
        waits = pauses(self.config.retry, self._random)
        for remaining in range(self.config.retry.max_attempts - 1, -1, -1):
            try:
                return attempt()
            except grpc.RpcError as error:
                typed = error_from_sync(error)
                pause_seconds = pause_after(typed, next(waits))
                if not remaining or pause_seconds is None or time.monotonic() + pause_seconds >= ends_at:
                    raise typed from error
                time.sleep(pause_seconds)
        raise TunesmithError("the retry policy allows no attempt at all")
