"""When a call is repeated and how long the pause is; pure. Makes no call and reads no clock of its own.

Every unary call may be repeated on UNAVAILABLE, and on a CANCELLED that this side did not ask for: a read changes
nothing, a mutating one carries a request_id that gives the first answer again, and the rest are idempotent by content.
"""

import random
import uuid
from collections.abc import Iterator

from google.protobuf.message import Message

from tunesmith_client._config import RetryPolicy
from tunesmith_client._errors import CallCancelled, TunesmithError, Unavailable

_LEAST_ATTEMPT_SECONDS = 0.05


def pauses(policy: RetryPolicy, random_source: random.Random) -> Iterator[float]:
    """Seconds to wait before the second, third, ... attempt; endless."""
    backoff = policy.initial_backoff_seconds
    while True:
        yield backoff * (1 - policy.jitter * random_source.random())
        backoff = min(backoff * 2, policy.max_backoff_seconds)


def pause_after(error: TunesmithError, pause_seconds: float) -> float | None:
    """Seconds to wait before trying again, at least what the service asks for; None when repeating cannot help."""
    if not isinstance(error, Unavailable):
        return None
    return max(pause_seconds, error.retry_after_seconds or 0.0)


def lost_if_cancelled(error: TunesmithError) -> TunesmithError:
    """A CANCELLED that nobody here asked for is a server that stopped without saying so; other errors as they are."""
    return Unavailable(error.message, code=error.code) if isinstance(error, CallCancelled) else error


class Repeats:
    """Of one call: whether it is made again after an error, and after how long."""

    def __init__(self, policy: RetryPolicy, random_source: random.Random) -> None:
        self._policy = policy
        self._pauses = pauses(policy, random_source)
        self._num_attempts = 0

    def pause(self, error: TunesmithError, *, remaining_seconds: float) -> float | None:
        """Seconds to wait before the next attempt; None when there is none. `remaining_seconds` is up to the deadline.

        As the deadline comes nearer the pauses get shorter, so that a service that is back in time is found in time.
        """
        self._num_attempts += 1
        if self._policy.max_attempts is not None and self._num_attempts >= self._policy.max_attempts:
            return None
        least_seconds = error.retry_after_seconds or 0.0
        pause_seconds = pause_after(error, next(self._pauses))
        if pause_seconds is None:
            return None
        pause_seconds = max(least_seconds, min(pause_seconds, remaining_seconds / 2))
        # An attempt needs time itself.
        return pause_seconds if remaining_seconds - pause_seconds > _LEAST_ATTEMPT_SECONDS else None


def method_of(request: Message) -> str:
    """`CreateProject` for a `CreateProjectRequest`."""
    return request.DESCRIPTOR.name.removesuffix("Request")


def give_request_id(request: Message) -> None:
    """Sets `request_id` where the request has that field and the caller left it empty, so that repeats are safe."""
    if "request_id" in request.DESCRIPTOR.fields_by_name and not request.request_id:  # type: ignore[attr-defined]
        request.request_id = str(uuid.uuid4())  # type: ignore[attr-defined]
