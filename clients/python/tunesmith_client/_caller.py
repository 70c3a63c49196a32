"""One blocking call: deadline, request id, repeats on UNAVAILABLE, typed errors. Knows no noun."""

import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from tunesmith_client._config import DEFAULT_DEADLINE_SECONDS, ClientConfig
from tunesmith_client._errors import client_closed, error_from_sync
from tunesmith_client._retry import Repeats, give_request_id, lost_if_cancelled, method_of

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Result = TypeVar("Result")

if TYPE_CHECKING:
    UnaryMethod = grpc.UnaryUnaryMultiCallable[Request, Response]


class Closable(Protocol):
    """What outlives a call and ends with its client."""

    def close(self) -> None:
        """Ends it; from any thread."""


class Caller:
    """Calls unary methods of one channel."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self._random = random.Random()
        self._closed = threading.Event()
        # A signal may close the client in the thread that holds it.
        self._lock = threading.RLock()
        self._open: weakref.WeakSet[Closable] = weakref.WeakSet()

    def keep(self, opened: Closable) -> None:
        """Has it closed with this caller, if it is still used then. CallCancelled when it is closed already."""
        with self._lock:
            if self._closed.is_set():
                raise client_closed()
            self._open.add(opened)

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

    @contextmanager
    def telling_of_close(self) -> Iterator[None]:
        """CallCancelled instead of what a channel says that is closed."""
        try:
            yield
        except ValueError as error:
            if self._closed.is_set():
                raise client_closed() from error
            raise

    def repeat(self, attempt: Callable[[], Result], *, ends_at: float) -> Result:
        """Runs `attempt` until it returns, or the policy ends it; `ends_at` is on the monotonic clock.

        When the client is closed: CallCancelled, or what the last attempt before that met.
        """
        repeats = Repeats(self.config.retry, self._random)
        while True:
            try:
                with self.telling_of_close():
                    return attempt()
            except grpc.RpcError as error:
                typed = error_from_sync(error)
                if not self._closed.is_set():
                    typed = lost_if_cancelled(typed)
                pause_seconds = repeats.pause(typed, remaining_seconds=ends_at - time.monotonic())
                if pause_seconds is None or self._closed.wait(pause_seconds):
                    raise typed from error

    def close(self) -> None:
        """No call is repeated any more, and what was kept ends; to be called before the channel is closed."""
        with self._lock:
            self._closed.set()
            opened = list(self._open)
        for each in opened:
            each.close()
